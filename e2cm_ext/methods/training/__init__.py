"""Training of exits by gradient descent, shared by all methods.

`run` is the loop. It trains one of two modules: `ExitHeads`, the heads alone, on features of a frozen network, or
`Joint`, heads and network together, on images. Both return the outputs of all heads and, last, the network's own
logits. A loss turns these and the labels into a number.

With `ExitHeads`, the network stays in eval mode: its batch normalisation keeps its statistics, and no gradient is
computed in it. `cache` keeps the features, in memory or on disk, so that an epoch costs only what the heads cost.

A run that was interrupted continues from its checkpoint and ends with the same bits as one that was not. Under
torchrun every process calls `run` on its share of the data, and DistributedDataParallel averages the gradients.
"""

from .feature_cache import Cached, cache, concatenate
from .loop import identity, run, step_decay
from .modules import ExitHeads, Features, Joint, Loss, Outputs, finish
from .seeding import generator, rank_and_world_size, seeded

__all__ = [
    "Cached",
    "ExitHeads",
    "Features",
    "Joint",
    "Loss",
    "Outputs",
    "cache",
    "concatenate",
    "finish",
    "generator",
    "identity",
    "rank_and_world_size",
    "run",
    "seeded",
    "step_decay",
]
