"""DEC with early exits (E2CM, section 4.3; DEC: Xie, Girshick and Farhadi, 2016): clustering that leaves early.

An encoder is a row of layers that ends in a code of 10 numbers, and clusters have centres among the codes:

1. The encoder is pretrained as a stacked denoising autoencoder: one layer after the other learns to restore its input
   from a corrupted one, then all of them together to restore the images.
2. k-means of the codes gives the first centres.
3. DEC: with q[i, k] the soft assignment of sample i to cluster k, Student's t around the centres, and p made of q by
   squaring and dividing by what each cluster holds, layers and centres descend along the gradient of KL(p || q). p is
   made anew now and then; the end is when less than 0.1% of the samples have changed their cluster since.

So far the large encoder. An exit behind its first layers has an encoder of its own: those layers, copied and frozen,
which is to say shared, and a last layer to a code, which goes through the same three steps. Then E2CM does the rest at
the exits: centres are class means, and Algorithm 1 needs no change.

What the paper leaves out, and is ours:

- The k-means of each encoder numbers its clusters as it likes. They are given the numbers of the large encoder's: those
  that agree with it in most training samples. No label is needed.
- Thresholds are found on training images with the large encoder's own assignment for labels. It is also what a sample
  gets that leaves at no exit: DEC's, the nearest centre, without the normalisation of equation 4.
- Adam with a falling rate and far fewer steps, in place of the original's 300,000 of plain gradient descent; the
  decoders of the shared layers start from those of the large encoder's pretraining.
- Images are divided by their root mean square, so that squares average 1, as in the original; that of the training
  images is kept in the network.

`build` makes the network, `train` does all of the above.
"""

from __future__ import annotations

import copy
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import ops
from ..clusters import Centres, Clustered, k_means, matching
from ..early_exit import EarlyExit
from ..heads.base import Head
from ..heads.class_means import ClassMeans
from ..heads.rules import Rule
from ..ops.types import Decisions
from ..stages import Stages
from ..utils import serialization

__all__ = ["CodeMeans", "Schedule", "Trained", "build", "divergence", "soft_assignment", "target", "train"]

_KIND = "DEC training"
_ROWS = 2048  # that are run at a time where nothing is learned


# ---- the formulas ---------------------------------------------------------------------------------------------------


def soft_assignment(codes: Tensor, centres: Tensor) -> Tensor:
    """q [N, K]: 1 / (1 + |code - centre|^2), over the sum of these of a sample: Student's t, one degree of freedom."""
    squares = (codes[:, None] - centres).square().sum(2)
    q = 1 / (1 + squares)
    return q / q.sum(1, keepdim=True)


def target(q: Tensor) -> Tensor:
    """p [N, K] from q of all samples: q^2 over the sum of q in the cluster, over the sum of these of a sample."""
    weight = q.square() / q.sum(0)
    return weight / weight.sum(1, keepdim=True)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q), the mean over the samples."""
    samples: Tensor = torch.special.xlogy(p, p) - torch.special.xlogy(p, q)
    return samples.sum(1).mean()


# ---- the network ----------------------------------------------------------------------------------------------------


class CodeMeans(ClassMeans, kind="code_means"):
    """ClassMeans of a code, which a layer makes of the features: an exit's own encoder is that layer, and what is
    before the exit."""

    def __init__(
        self,
        num_classes: int,
        feature_shape: Sequence[int],
        *,
        code: int = 10,
        passes: int = 2,
        channels_last: bool = False,  # of no meaning here: a code is a vector
    ) -> None:
        self.code = code
        super().__init__(num_classes, feature_shape, passes=passes)
        self.encoder = nn.Linear(math.prod(self.feature_shape), code)

    def _mean_shape(self) -> tuple[int, ...]:
        return (self.code,)

    def features(self, x: Tensor) -> Tensor:
        code: Tensor = self.encoder(x.flatten(1).float())
        return code

    def adopt(self, centres: Tensor, codes: Tensor) -> None:
        """These centres [K, code] in the place of class means; distances of all the codes [N, code] give the scale."""
        self.reset()
        self.means.copy_(centres)
        self.center.copy_(self.means.mean(0))
        self.scale.copy_(ops.class_distances(codes, self.means, self.center).double().mean(0))
        self.counts.copy_(
            ops.class_distances(codes, self.means, self.center).argmin(1).bincount(minlength=len(centres))
        )
        self.fitted = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.features(x))

    def score(self, x: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
        return super().score(self.features(x), rule)

    def step(
        self, x: Tensor, threshold: float | Tensor, ids: Tensor, out: Decisions, *, rule: Rule, exit: int
    ) -> tuple[Tensor, Tensor]:
        return Head.step(self, x, threshold, ids, out, rule=rule, exit=exit)

    def flops(self) -> int:
        """The layer's, and K (3 D - 1) for a code of D numbers."""
        return 2 * self.encoder.weight.numel() + super().flops()

    def config(self) -> dict[str, Any]:
        return super().config() | {"code": self.code}


class _Divided(nn.Module):
    """Images [B, ...] as rows [B, D], divided by a number."""

    by: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("by", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / self.by


def build(
    example_input: Tensor,
    clusters: int = 10,
    *,
    widths: Sequence[int] = (500, 500, 2000),
    code: int = 10,
    seed: int = 0,
) -> EarlyExit:
    """An untrained DEC encoder with an exit behind every layer but the last two, as in the paper: the large encoder is
    500-500-2000-10, the exits' own are 500-10 ("small") and 500-500-10 ("middle").

    example_input: a batch of images of any shape; they are taken as vectors. Give it to `train`.
    """
    if len(widths) < 2:
        raise ValueError(
            f"`widths` is {tuple(widths)}; wanted at least 2 layers before the code: an exit is between two"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [math.prod(example_input.shape[1:]), *widths]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in zip(sizes, widths, strict=False)]
        last = Clustered(nn.Sequential(layers[-1], nn.Linear(widths[-1], code)), Centres(torch.zeros(clusters, code)))
        parts = [nn.Sequential(_Divided(), layers[0]), *layers[1:-1], last]
        names = ["small", "middle"] if len(widths) == 3 else [f"layer {j + 1}" for j in range(len(widths) - 1)]
        stages = Stages(parts, names).eval()
        ee = EarlyExit(stages, example_input, head=lambda k, shape: CodeMeans(k, shape, code=code))
    ee.labelled = False
    return ee


def shifted(images: Tensor, pixels: float = 2, degrees: float = 10) -> Tensor:
    """Each of the images [B, C, H, W], 0 at their edges, moved by up to so many pixels and turned, at random."""
    count, _, height, width = images.shape
    angle, right, down = (2 * torch.rand(3, count, device=images.device) - 1).unbind()
    angle = angle * math.radians(degrees)
    right, down = 2 * pixels / width * right, 2 * pixels / height * down
    theta = torch.stack([angle.cos(), -angle.sin(), right, angle.sin(), angle.cos(), down], 1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


# ---- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How long, and how fast. Ours, but for corruption, starts, batch and tolerance."""

    layer_epochs: int = 4
    epochs: int = 16  # of the whole autoencoder
    exit_epochs: int = 4  # of an exit's, which shares most of its layers with that
    rate: float = 1e-3  # of Adam, for autoencoders; it falls to 0 along half a cosine
    corruption: float = 0.2  # share of the numbers that are set to 0
    starts: int = 20  # of k-means
    cluster_rate: float = 2e-4  # of Adam, for DEC; it falls in the same way, along `most` targets
    refresh: int = 80  # batches between two targets
    tolerance: float = 0.001  # the end: fewer of the samples have changed their cluster between two targets
    most: int = 25  # targets, if that does not happen
    batch: int = 256


@dataclass
class Trained:
    """What has been learned of each encoder, the largest first; clusters are numbered as the large encoder does."""

    assignment: list[Tensor] = field(default_factory=list)  # [N] int64: the cluster of every training sample
    start: list[Tensor] = field(default_factory=list)  # [N] int64: by k-means, before DEC
    changed: list[list[float]] = field(default_factory=list)  # shares of the samples, between two targets


def train(
    ee: EarlyExit,
    loader: Iterable[Any],
    *,
    distort: Callable[[Tensor], Tensor] | None = None,
    schedule: Schedule = Schedule(),
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    precision: torch.dtype | None = None,
    progress: bool = True,
) -> Trained:
    """Pretrains and clusters all encoders of what `build` has made, in place; calibrate it afterwards, on any images.

    loader: yields images or (images, labels); no label is looked at. All images are held in memory, as float32.
    distort: images [B, ...] -> images that are still of the same cluster, altered at random, such as `shifted` makes.
    The codes that DEC learns from are then those of altered images; those that targets and centres are made from never
    are. Ours, after DEC with data augmentation (Guo, Zhu, Liu and Yin, 2018). None: as in the paper.
    checkpoint: a file to go on from if it is there, written after every step of the training. precision: of products
    of matrices, by autocast, such as torch.bfloat16; None: float32. torch's generators are left as they were.
    """
    images = _gathered(ee, loader, progress)
    with torch.random.fork_rng([images.device] if images.is_cuda else []), torch.enable_grad():
        work = _Work(ee, images, distort, schedule, seed, precision, progress)
        done = work.load(checkpoint) if checkpoint is not None and Path(checkpoint).exists() else 0
        for number, (step, which) in enumerate(work.steps()):
            if number < done:
                continue
            torch.manual_seed(1000 * seed + number)  # a run that goes on draws what it would have drawn
            step(which)
            if checkpoint is not None:
                work.save(checkpoint, number + 1)
    ee.thresholds = math.inf
    ee.eval()
    return work.trained


def _gathered(ee: EarlyExit, loader: Iterable[Any], progress: bool) -> Tensor:
    ready = ee.batches(loader, progress)
    images = torch.cat([batch.float() for batch in ready.images("images")])
    if not images.isfinite().all():
        raise ValueError("the images hold NaN or infinity: all that is learned would be spoiled")
    return images


class _Work(nn.Module):
    """All that is being trained, and on what. Encoder 0 is the large one; then come the exits', the last one first."""

    def __init__(
        self,
        ee: EarlyExit,
        images: Tensor,
        distort: Callable[[Tensor], Tensor] | None,
        schedule: Schedule,
        seed: int,
        precision: torch.dtype | None,
        progress: bool,
    ) -> None:
        super().__init__()
        first, *between, last = ee.stages
        if not (isinstance(first, nn.Sequential) and isinstance(first[0], _Divided) and isinstance(last, Clustered)):
            raise TypeError("`ee` is not what dec.build makes")
        divided, layer = first
        assert isinstance(divided, _Divided) and isinstance(last.network, nn.Sequential)
        self.distort = distort
        self.schedule, self.seed, self.precision, self.progress = schedule, seed, precision, progress
        self.names = ["large", *reversed(ee.exit_names)]
        by = images.square().mean().sqrt()
        divided.by.copy_(by if by > 0 else torch.ones_like(by))
        self.images, self.flat = images, divided
        self.rows = divided(images)
        self.layers = nn.ModuleList([layer, *between, *last.network])
        self.heads, self.centres = ee.heads, last.centres
        sizes = [self.rows.shape[1], *(_linear(layer).out_features for layer in self.layers)]
        # What undoes each layer: the first gives images, which may be anything, the others what was behind a ReLU.
        undo = [_decoder(b, a, d > 0) for d, (a, b) in enumerate(pairwise(sizes))]
        self.undo = nn.ModuleList(undo).to(images.device)
        exits_undo = (
            [*copy.deepcopy(undo[: exit + 1]), _decoder(sizes[-1], sizes[exit + 1], True)]
            for exit in reversed(range(len(ee.heads)))
        )
        self.exits_undo = nn.ModuleList(nn.ModuleList(each) for each in exits_undo).to(images.device)
        self.trained = Trained()
        which_images = zlib.crc32(
            serialization.bytes_of(self.rows)
        )  # no sum: its last bits depend on the number of threads
        self._about = [sizes, len(images), which_images, asdict(schedule), seed, str(precision), distort is not None]

    def steps(self) -> list[tuple[Callable[[int], None], int]]:
        each = (self._pretrain, self._fine_tune, self._cluster)
        return [(step, which) for which in range(len(self.names)) for step in each]

    # ---- the encoders -----------------------------------------------------------------------------------------------

    def _parts(self, which: int) -> tuple[list[nn.Module], list[nn.Module]]:
        """The frozen layers of an encoder, and those that learn."""
        if which == 0:
            return [], list(self.layers)
        exit = len(self.heads) - which
        head = self.heads[exit]
        assert isinstance(head, CodeMeans)
        return list(self.layers[: exit + 1]), [head.encoder]

    def _decoders(self, which: int) -> list[nn.Module]:
        """Of all its layers, the first first."""
        own: Any = self.undo if which == 0 else self.exits_undo[which - 1]
        return list(own)

    # ---- the three steps --------------------------------------------------------------------------------------------

    def _pretrain(self, which: int) -> None:
        """Layer by layer: restore the layer's input from a corrupted one."""
        frozen, layers = self._parts(which)
        for own, large in zip(self._decoders(which), self.undo[: len(frozen)], strict=False):
            own.load_state_dict(large.state_dict())
        rows = self._run(frozen, self.rows)
        for d, (layer, undo) in enumerate(zip(layers, self._decoders(which)[len(frozen) :], strict=True)):
            _linear(layer).reset_parameters()
            _linear(undo).reset_parameters()
            # A code is not corrupted: none of its few numbers can be told from the others.
            behind = 0.0 if layer is layers[-1] else self.schedule.corruption
            denoise = nn.Sequential(nn.Dropout(self.schedule.corruption), layer, nn.Dropout(behind), undo)
            what = f"{self.names[which]}: layer {len(frozen) + d + 1} of {len(frozen) + len(layers)}"
            self._restore(denoise, rows, rows, self.schedule.layer_epochs, what)
            rows = self._run([layer], rows)

    def _fine_tune(self, which: int) -> None:
        """The whole autoencoder: restore the images; what is frozen stays as it is."""
        frozen, layers = self._parts(which)
        whole = nn.Sequential(*layers, *reversed(self._decoders(which)))
        epochs = self.schedule.exit_epochs if which else self.schedule.epochs
        rows = self._run(frozen, self.rows)
        self._restore(whole, rows, self.rows, epochs, f"{self.names[which]}: autoencoder")

    def _restore(self, module: nn.Module, rows: Tensor, wanted: Tensor, epochs: int, what: str) -> None:
        optimizer = torch.optim.Adam(module.parameters(), self.schedule.rate, fused=True)
        batches = epochs * math.ceil(len(rows) / self.schedule.batch)
        falling = _falling(optimizer, batches)
        with tqdm(total=batches, desc=what, unit="batch", disable=not self.progress, leave=False) as bar:
            for _ in range(epochs):
                for some in self._shuffled():
                    loss = F.mse_loss(self._call(module, rows[some]), wanted[some])
                    _descend(optimizer, loss)
                    falling.step()
                    bar.update(1)
        _refuse_non_finite(module, what)

    def _cluster(self, which: int) -> None:
        """k-means, then DEC."""
        frozen, layers = self._parts(which)
        encoder = nn.Sequential(*layers)
        rows, altered = self._run(frozen, self.rows), self._altered(frozen)
        means, start = k_means(self._run(layers, rows), len(self.centres.means), self.seed, self.schedule.starts)
        centres = nn.Parameter(means)
        optimizer = torch.optim.Adam([*encoder.parameters(), centres], self.schedule.cluster_rate, fused=True)
        falling = _falling(optimizer, self.schedule.most * self.schedule.refresh)
        before, changed = start, []
        batches = self._endless()
        with tqdm(desc=f"{self.names[which]}: clusters", unit="target", disable=not self.progress, leave=False) as bar:
            for _ in range(self.schedule.most):
                with torch.no_grad():
                    q = soft_assignment(self._run(layers, rows), centres)
                now = q.argmax(1)
                changed.append(float((now != before).double().mean()))
                bar.set_postfix(changed=f"{changed[-1]:.2%}")
                if len(changed) > 1 and changed[-1] < self.schedule.tolerance:
                    break
                before, p = now, target(q)
                for some in islice(batches, self.schedule.refresh):
                    q = soft_assignment(self._call(encoder, altered(some)), centres)
                    _descend(optimizer, divergence(p[some], q))
                    falling.step()
                bar.update(1)
        _refuse_non_finite(encoder, "DEC")
        self._note(which, start, changed, centres.detach())

    def _note(self, which: int, start: Tensor, changed: list[float], means: Tensor) -> None:
        """What has come out, with the large encoder's numbers."""
        frozen, layers = self._parts(which)
        codes = self._run([*frozen, *layers], self.rows)
        found = ops.class_distances(codes, means, means.mean(0)).argmin(1)
        if which == 0:
            self.centres.means.copy_(means)
        else:
            numbers = matching(found, self.trained.assignment[0], len(means))
            found, start, means = numbers[found], numbers[start], means[numbers.argsort()]
            head = self.heads[len(self.heads) - which]
            head.adopt(means, codes)  # type: ignore[operator]
        self.trained.assignment.append(found)
        self.trained.start.append(start)
        self.trained.changed.append(changed)

    # ---- small parts ------------------------------------------------------------------------------------------------

    def _altered(self, frozen: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
        """What frozen layers make of the images with these numbers, distorted."""
        if self.distort is None:
            return self._run(frozen, self.rows).__getitem__
        distort = self.distort

        @torch.no_grad()
        def rows(some: Tensor) -> Tensor:
            return self._call(nn.Sequential(*frozen), self.flat(distort(self.images[some])))

        return rows

    @torch.no_grad()
    def _run(self, layers: Sequence[nn.Module], rows: Tensor) -> Tensor:
        """In float32, as later on."""
        whole = nn.Sequential(*layers)
        return torch.cat([whole(some) for some in torch.split(rows, _ROWS)]) if layers else rows

    def _call(self, module: nn.Module, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, self.precision, enabled=self.precision is not None):
            out: Tensor = module(rows)
        return out.float()

    def _shuffled(self) -> Iterator[Tensor]:
        yield from torch.split(torch.randperm(len(self.rows)).to(self.rows.device), self.schedule.batch)

    def _endless(self) -> Iterator[Tensor]:
        while True:
            yield from self._shuffled()

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], done: int) -> None:
        results = {
            f"trained.{name}.{which}": value
            for name in ("assignment", "start")
            for which, value in enumerate(getattr(self.trained, name))
        }
        tensors = {f"work.{name}": value.contiguous() for name, value in self.state_dict().items()}
        info = {"about": self._about, "done": done, "changed": self.trained.changed}
        serialization.write(path, _KIND, tensors | results, info)

    def load(self, path: str | os.PathLike[str]) -> int:
        """How many steps are done."""
        tensors, info = serialization.read(path, _KIND)
        if info["about"] != json.loads(json.dumps(self._about)):
            raise ValueError(f"{path} is of another training (images, sizes, schedule, seed ...): give another file")
        self.load_state_dict({name[5:]: value for name, value in tensors.items() if name.startswith("work.")})
        for name in ("assignment", "start"):
            found = [tensors[f"trained.{name}.{which}"] for which in range(len(info["changed"]))]
            setattr(self.trained, name, [value.to(self.rows.device) for value in found])
        self.trained.changed = info["changed"]
        return int(info["done"])


def _linear(part: nn.Module) -> nn.Linear:
    return next(module for module in part.modules() if isinstance(module, nn.Linear))


def _decoder(size: int, out: int, rectified: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, out), *([nn.ReLU()] if rectified else []))


def _falling(optimizer: torch.optim.Optimizer, batches: int) -> torch.optim.lr_scheduler.LRScheduler:
    """To 0 along half a cosine, in so many batches."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, batches))


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _refuse_non_finite(module: nn.Module, what: str) -> None:
    if not all(value.isfinite().all() for value in module.parameters()):
        raise ValueError(f"weights became NaN or infinite ({what}): a lower rate in `schedule` may help")
