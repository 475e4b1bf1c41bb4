"""A network with FastExits in its hand-written forward()."""

from __future__ import annotations

from torch import nn

from e2cm_ext import (
    FastExit,
    fast_exit,
)
from support.networks import (
    CLASSES,
    loader,
    net,
)


class NetWithExits(nn.Module):
    """The network of `small`, with three exits in it."""

    def __init__(self, base, **options):
        super().__init__()
        self.base = base
        self.exit1 = FastExit((12, 8, 8), CLASSES, **options)
        self.exit2 = FastExit((12, 8, 8), CLASSES, **options)
        self.exit3 = FastExit((24, 4, 4), CLASSES, **options)

    def forward(self, x):
        base = self.base
        x, state = self.exit1(base.stem(x))
        x, state = self.exit2(base.block1(x), state)
        x, state = self.exit3(base.block2(base.down(x)), state)
        x = base.block3(x)
        return state.result(base.classifier(base.drop(x.mean((2, 3)))))


def fitted(batches=None, head="class_means", **options) -> NetWithExits:
    model = NetWithExits(net(), head=head, **options).eval()
    fast_exit.fit(model, batches or loader(), progress=False)
    return model
