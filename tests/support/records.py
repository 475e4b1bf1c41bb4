"""Records of random samples, one worked out by hand, and what a replay says sample by sample."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from e2cm_ext.calibration.curves import Curve
from e2cm_ext.calibration.record import Record
from e2cm_ext.calibration.search import Points
from e2cm_ext.stages.flops import Costs
from support.tensors import INF, NAN, generator, seeds


def random_record(
    rows: int, exits: int, *, seed: int = 0, values: int = 0, odd: float = 0.0, classes: int = 5, heads: bool = True
) -> Record:
    """Later exits are surer, and right more often. `values`: how many certainties there are, 0 for as many as floats;
    `odd`: the share of NaN, infinities and zeros."""
    g = generator(seed)
    columns = exits + 1
    depth = torch.arange(columns) / columns
    certainty = torch.randn(rows, columns, generator=g) + depth
    label = torch.randint(classes, (rows,), generator=g)
    right = torch.rand(rows, columns, generator=g) < torch.sigmoid(2 * certainty)
    wrong = (label[:, None] + torch.randint(1, classes, (rows, columns), generator=g)) % classes
    if values:
        certainty = torch.randint(values, (rows, columns), generator=g) / values - 0.5
    strange = torch.tensor([NAN, INF, -INF, 0.0, -0.0])[torch.randint(5, (rows, columns), generator=g)]
    certainty = torch.where(torch.rand(rows, columns, generator=g) < odd, strange, certainty)
    costs = Costs(
        tuple(torch.randint(1, 1000, (columns,), generator=g).tolist()),
        tuple(torch.randint(200 if heads else 1, (exits,), generator=g).tolist()),
        tuple(f"exit{j}" for j in range(exits)),
    )
    return Record(certainty, torch.where(right, label[:, None], wrong), label, costs, "confidence")


@st.composite
def records(draw, rows=(1, 2, 3, 5, 17, 63, 64, 65, 130), exits=(0, 1, 2, 3, 6)) -> Record:
    """With ties, NaN, +-inf and both zeros among the certainties."""
    return random_record(
        draw(st.sampled_from(rows)),
        draw(st.sampled_from(exits)),
        seed=draw(seeds),
        values=draw(st.sampled_from([0, 0, 1, 2, 5])),
        odd=draw(st.sampled_from([0.0, 0.1, 0.9])),
        heads=draw(st.booleans()),
    )


@st.composite
def thresholds_for(draw, record: Record) -> torch.Tensor:
    """Values that occur, that lie beside them, and +-inf."""
    chosen = []
    for j in range(record.exits):
        column = record.confidence[:, j]
        occurring = column[~column.isnan()].tolist() or [0.0]
        chosen.append(draw(st.one_of(st.sampled_from([INF, -INF, *occurring]), st.floats(-3, 3, width=32))))
    return torch.tensor(chosen, dtype=torch.float32)


def replay_by_hand(record: Record, thresholds: torch.Tensor) -> tuple[list[int], list[int], float]:
    """Exits, predictions and mean FLOPs, sample by sample."""
    exits, predictions, spent = [], [], 0
    limits = thresholds.tolist()
    for sure, said in zip(record.confidence.tolist(), record.prediction.tolist(), strict=True):
        for j in range(record.exits + 1):
            spent += record.costs.stages[j]
            if j == record.exits:
                break
            if limits[j] < INF:
                spent += record.costs.heads[j]
            if sure[j] > limits[j]:
                break
        exits.append(j)
        predictions.append(said[j])
    return exits, predictions, spent / len(exits) / record.costs.base


def small_record() -> Record:
    """Stages cost 10, 20, 70, heads 1 and 4."""
    return Record(
        torch.tensor([[0.9, 0.9, 1.0], [0.5, 0.8, 1.0], [0.5, 0.5, 1.0], [NAN, 0.9, NAN]]),
        torch.tensor([[0, 1, 1], [1, 2, 1], [1, 1, 2], [2, 2, 0]]),
        torch.tensor([0, 2, 2, 0]),
        Costs((10, 20, 70), (1, 4), ("a", "b")),
    )


def points_of(*pairs: tuple[float, float]) -> Points:
    flops, accuracy = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).unbind(1)
    return Points(flops, accuracy, torch.arange(len(pairs), dtype=torch.float32)[:, None])


def small_curve() -> Curve:
    """Corners 0, 1, 3; point 2 lies below the hull."""
    front = points_of((0.2, 0.5), (0.4, 0.8), (0.6, 0.82), (1.0, 0.9))
    return Curve(*front.pick([0, 1, 3]), base_accuracy=0.9, names=("a",), rule="confidence", front=front)
