"""Pictures: what is drawn is what the numbers say, at any number of exits, and nothing of the user's is touched."""

import dataclasses
import io
import sys
import warnings

import pytest
import torch
from support.records import random_record, small_curve, small_record
from support.subprocesses import run_python

from e2cm_ext.calibration.record import Record

pytest.importorskip("matplotlib")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@pytest.fixture
def ax():
    figure, ax = pyplot.subplots()
    yield ax
    pyplot.close(figure)


def drawn(ax: Axes) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()]


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_a_curve_has_lines_points_and_the_base_network(ax):
    assert small_curve().plot(ax, label="here", color="red") is ax
    lines, points, base = ax.get_lines()
    assert drawn(ax) == [
        ([0.2, 0.4, 1.0], [0.5, 0.8, 0.9]),
        ([0.2, 0.4, 0.6, 1.0], [0.5, 0.8, 0.82, 0.9]),
        ([0, 1], [0.9, 0.9]),
    ]
    assert (lines.get_linestyle(), points.get_linestyle(), base.get_linestyle()) == ("-", "None", "--")
    assert lines.get_color() == points.get_color() == "red"
    assert ax.get_legend_handles_labels()[1] == ["here", "base network"]
    assert small_curve().plot() is ax  # the current axes


def test_without_the_hull_there_are_points_only(ax):
    small_curve().plot(ax, hull=False, label="here")
    assert [line.get_linestyle() for line in ax.get_lines()] == ["None", "--"]
    assert ax.get_legend_handles_labels()[1] == ["here", "base network"]


def test_curves_of_one_network_share_its_line(ax):
    found = small_curve()
    for label in ("a", "b"):
        found.plot(ax, label=label)
    assert ax.get_legend_handles_labels()[1] == ["a", "base network", "b"]
    dataclasses.replace(found, base_accuracy=0.8).plot(ax, label="c")
    assert ax.get_legend_handles_labels()[1] == ["a", "base network", "b", "c"]
    assert [y for x, y in drawn(ax) if x == [0, 1]] == [[0.9, 0.9], [0.8, 0.8]]


def test_a_curve_over_times(ax):
    """The thresholds of the curve are 0, 1, 2, 3; the last is fast."""
    found = small_curve()
    found.plot(ax, time=lambda thresholds: [{0: 2, 1: 3, 2: 4, 3: 1}[int(t)] for t in thresholds[:, 0]])
    assert drawn(ax)[:2] == [([1, 2, 3], [0.9, 0.5, 0.8]), ([2, 3, 4, 1], [0.5, 0.8, 0.82, 0.9])]
    assert ax.get_xlabel() == "time"
    found.plot(ax, time=torch.tensor([2.0, 3.0, 1.0]))
    assert drawn(ax)[3:] == [([1, 2, 3], [0.9, 0.5, 0.8]), ([2, 3, 1], [0.5, 0.8, 0.9])]
    for wrong in ([1.0, 2.0], torch.ones(3, 1), lambda thresholds: thresholds):
        with pytest.raises(ValueError, match=r"`time` .* shape .*; wanted \[3\], one per threshold vector"):
            found.plot(ax, time=wrong)


# ---- records ---------------------------------------------------------------------------------------------------------


def probable(record: Record) -> Record:
    return dataclasses.replace(record, confidence=record.confidence.sigmoid())


def panels(figure: Figure) -> dict[str, Axes]:
    return dict(zip(("accuracy", "exits", "reliability", "certainty"), figure.axes, strict=True))


def heights(ax: Axes) -> list[list[float]]:
    """Of the bars of each kind."""
    return [[bar.get_height() for bar in bars] for bars in ax.containers if not isinstance(bars, str) and len(bars)]


def test_a_record_by_hand():
    """Stages cost 10, 20, 70, heads 1 and 4; see test_replay_by_hand for where each sample leaves."""
    record = dataclasses.replace(small_record(), confidence=small_record().confidence.nan_to_num(1.0))
    drawn_in = panels(record.plot([0.5, 0.5]))
    exits, base_point, base = drawn(drawn_in["accuracy"])
    assert exits == ([0.11, 0.34], [0.25, 0.25])
    assert (base_point, base) == (([1], [0.5]), ([0, 1], [0.5, 0.5]))
    replay = record.replay([0.5, 0.5])
    bars = heights(drawn_in["exits"])  # classes 0, 1, 2
    assert bars == [[int(((replay.exit == j) & (record.label == k)).sum()) for j in range(3)] for k in range(3)]
    tops = [[bar.get_y() + bar.get_height() for bar in kind] for kind in drawn_in["exits"].containers]
    assert tops == torch.tensor(bars).cumsum(0).tolist()
    assert [label.get_text() for label in drawn_in["exits"].get_xticklabels()] == ["a", "b", "(end)"]
    assert f"accuracy {replay.accuracy:.4f} at FLOPs {replay.flops:.4f}" in drawn_in["exits"].get_title()
    found = record.reliability([0.5, 0.5])
    assert heights(drawn_in["reliability"]) == [found.accuracy.nan_to_num().tolist()]
    assert f"{found.ece:.4f}" in drawn_in["reliability"].get_title()
    counts = [text.get_text() for text in drawn_in["reliability"].texts]
    assert counts == [str(count) if count else "" for count in found.counts.tolist()]
    (lines,) = (lines for lines in drawn_in["certainty"].collections if lines.get_label() == "threshold")
    assert [line.tolist() for line in lines.get_segments()] == [
        [pytest.approx([j - 0.4, 0.5]), pytest.approx([j + 0.4, 0.5])] for j in range(2)
    ]


def test_certainties_of_right_and_wrong():
    """101 right answers and as many wrong ones at every exit, whose quantiles are easy."""
    steps = torch.arange(101) / 100
    confidence = torch.cat([0.5 + steps / 2, steps / 2])[:, None].repeat(1, 3)
    prediction = torch.cat([torch.zeros(101), torch.ones(101)])[:, None].repeat(1, 3).long()
    record = dataclasses.replace(
        small_record(), confidence=confidence, prediction=prediction, label=torch.zeros(202).long()
    )
    right, wrong = panels(record.plot())["certainty"].containers
    assert [bar.get_y() for bar in right] == pytest.approx([0.625] * 2)
    assert [bar.get_y() for bar in wrong] == pytest.approx([0.125] * 2)
    assert [bar.get_height() for bar in (*right, *wrong)] == pytest.approx([0.25] * 4)


@pytest.mark.slow
@pytest.mark.parametrize(("exits", "classes"), [(1, 10), (12, 11), (28, 10), (100, 11)])
def test_any_number_of_exits_can_be_drawn(exits, classes):
    record = probable(random_record(200, exits, odd=0.05, classes=classes))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that there is no room
        figure = record.plot(record.confidence[:, :-1].nanquantile(0.5, dim=0))
        figure.savefig(io.BytesIO(), dpi=30)
    drawn_in = panels(figure)
    assert len(heights(drawn_in["exits"])) == (10 if classes == 10 else 1)
    assert sum(map(sum, heights(drawn_in["exits"]))) == 200


def test_a_rule_that_compares_no_probabilities():
    record = dataclasses.replace(probable(random_record(50, 3)), rule="entropy")
    drawn_in = panels(record.plot())
    (text,) = drawn_in["reliability"].texts
    assert "no probability" in text.get_text().replace("\n", " ")
    assert not drawn_in["reliability"].containers
    assert "'entropy'" in drawn_in["certainty"].get_ylabel()


def test_records_that_cannot_be_drawn():
    with pytest.raises(ValueError, match="`record` holds 0 samples at 2 exits; wanted at least one of each"):
        small_record().part([]).plot()
    with pytest.raises(ValueError, match="`record` holds 4 samples at 0 exits"):
        small_record().at_exits([]).plot()
    with pytest.raises(ValueError, match=r"`thresholds` has shape \[1\]"):
        small_record().plot([0.5])


# ---- manners ---------------------------------------------------------------------------------------------------------


def test_figures_of_records_are_not_pyplot_s(ax):
    before, current = pyplot.get_fignums(), pyplot.gcf()
    assert isinstance(small_record().plot(), Figure)
    assert (pyplot.get_fignums(), pyplot.gcf()) == (before, current)


@pytest.mark.slow
@pytest.mark.subprocess
def test_matplotlib_is_loaded_only_to_draw():
    code = "import sys, e2cm_ext; assert not any(name.startswith('matplotlib') for name in sys.modules)"
    run_python("-c", code)


def test_without_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    for plot in (small_curve().plot, small_record().plot):
        with pytest.raises(ImportError, match="plot needs matplotlib: `pip install matplotlib`"):
            plot()
