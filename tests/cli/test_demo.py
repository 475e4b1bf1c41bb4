"""The demo with its smallest network: it runs, and its parts have no digit in common."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from e2cm_ext.cli import demo, main


@pytest.mark.slow
def test_the_small_demo_runs(tmp_path):
    out = tmp_path / "demo.html"
    found = CliRunner().invoke(main, ["demo", "--small", "-q", "--json", "-o", str(out)])
    assert found.exit_code == 0, found.stderr
    rows = json.loads(found.stdout)["rows"]
    assert [row["name"].split()[0] for row in rows] == ["the", "class", "SDN,", "whitened"]
    for row in rows[1:]:
        assert 0 < row["flops"] < 0.7 and row["time"]["p10"] <= row["time"]["median"] and "of" in row["exits_used"]
    assert rows[3]["accuracy"] > 0.5 > 0.1  # ten classes
    text = out.read_text()
    assert all(row["name"].replace("'", "&#39;") in text for row in rows) and "e2cm demo --small" in text


def test_parts_have_no_digit_in_common(monkeypatch):
    monkeypatch.setattr(demo, "_NOISE", 0.0)
    parts = demo.load_parts()
    found = []
    for part in parts:
        images = torch.cat([images for images, _ in part])
        # A digit is identified by its pixels, wherever it is placed.
        found.append({tuple(sorted(image.flatten().mul(16).round().int().tolist())[-64:]) for image in images})
    assert [len(part.dataset) for part in parts] == [2000, 700, 894]
    shared = [len(a & b) for a, b in ((found[0], found[1]), (found[0], found[2]), (found[1], found[2]))]
    assert max(shared) <= 3  # some digits are alike but for the order of their pixels


def test_digits_are_placed_everywhere():
    canvas = demo.place_randomly(torch.ones(500, 1, 8, 8), torch.Generator().manual_seed(0)) > 0.5
    rows, columns = canvas.any(3).float().argmax(2).flatten(), canvas.any(2).float().argmax(2).flatten()
    assert canvas.shape == (500, 1, 12, 12)
    assert set(rows.tolist()) == set(columns.tolist()) == {0, 1, 2, 3, 4}
