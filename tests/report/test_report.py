"""The report: it is valid HTML, and its figures are those of the record, whatever the classes are called."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from support import networks

import e2cm_ext as e2cm
from e2cm_ext import report
from e2cm_ext.report.gallery import build_gallery
from e2cm_ext.report.view import PageView
from e2cm_ext.utils import timing

NASTY = ['<script>alert("1")</script>', "a & b", "\"quoted\" 'twice'", "ünï", "<b>", "5", "6", "7", "8", "{{ 9 }}"]
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Elements in order, with attributes; every one that is opened is closed, in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        assert len({name for name, _ in attributes}) == len(attributes), (tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for found, attributes in self.found if found == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    model = networks.net()
    batches = networks.loader(240, 60)
    ee = e2cm.EarlyExit(model, batches[0][0][:1]).fit(batches, progress=False)
    record = ee.record(networks.loader(200, 50, seed=5), progress=False)
    ee.calibrate(record, flops=0.8, progress=False)
    before = ee.thresholds.clone()
    returned = report.write(
        path, ee, networks.loader(200, 50, seed=5), title="<Title> & more", data="data <1>", classes=NASTY,
        batch_size=8, command="e2cm report --title '<x>'", progress=False,
    )  # fmt: skip
    assert torch.equal(ee.thresholds, before)
    return path.read_text(), ee, returned


def test_it_is_valid_html(made):
    text, _, _ = made
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>") and page.all("html") == [{"lang": "en"}]
    names = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(names) == len(set(names))
    for attributes in (attributes for _, attributes in page.found):
        for value in attributes.values():
            for name in re.findall(r"url\(#([^)]+)\)", value or "") + re.findall(r"^#(.+)", value or ""):
                assert name in names


def test_it_has_no_external_resources(made):
    text, _, _ = made
    assert not re.search(r"https?:|src=\"(?!data:)|@import|url\((?!#)|<link|<script", text)


def test_images_and_tables_are_described_for_screen_readers(made):
    page = Page(made[0])
    assert page.all("img") and all(image["alt"] for image in page.all("img"))
    drawn = [svg for svg in page.all("svg") if svg.get("class") in ("plot", "small")]
    assert len(drawn) > 6 and all(svg["role"] == "img" and svg["aria-label"] for svg in drawn)
    assert len(page.all("caption")) == len(page.all("table")) >= 4
    assert all(cell["scope"] in ("row", "col") for cell in page.all("th"))
    assert len(page.all("h1")) == 1 and page.all("main")


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_contrast_with_their_background(made, scheme):
    """WCAG 2: 4.5 for text, 3 for lines and bars."""
    found = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", made[0], re.S)]
    colours = found[scheme]

    def contrast(one, other):
        high, low = sorted((luminance(colours[one]), luminance(colours[other])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for text in ("ink", "muted", "red"):
        for ground in ("ground", "card"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    assert all(contrast(line, "ground") >= 3 for line in ("blue", "orange", "green", "red"))


def test_names_are_escaped(made):
    text, _, _ = made
    shown = "".join(Page(text).text)
    for name in (*NASTY, "<Title> & more", "data <1>", "e2cm report --title '<x>'"):
        assert name in shown, name
    assert "<script>" not in text and "alert(&#34;1" in text


def test_its_figures_are_those_of_the_record(made):
    text, ee, record = made
    shown = " ".join(" ".join(Page(text).text).split())
    replay = record.replay(ee.thresholds)
    assert f"accuracy {replay.accuracy:.4f}" in shown
    assert f"network alone {float(record.accuracy[-1]):.4f}" in shown
    early = float((replay.exit < record.exits).double().mean())
    assert f"{early:.1%}" in shown
    assert f"{replay.flops:.3f}" in shown


def test_exits_classes_and_mistakes_are_counted(made):
    _, ee, record = made
    view = PageView(ee, record, report.SplitCurve(ee, record), ee.profile(networks.images(2), 2, repeats=1), 2, NASTY)
    replay = record.replay(ee.thresholds)
    exits = view.exits()
    assert [row.leavers for row in exits] == replay.exit.bincount(minlength=record.exits + 1).tolist()
    for j, row in enumerate(exits):
        here = (replay.exit == j).nonzero().flatten().tolist()
        if here:
            assert row.accuracy == pytest.approx(sum(bool(replay.correct[i]) for i in here) / len(here))
    assert sum(row.flops * row.share for row in exits) == pytest.approx(replay.flops)
    classes = view.class_rows()
    assert sum(row.flops * row.samples for row in classes) / len(record) == pytest.approx(replay.flops)
    assert [row.flops for row in classes] == sorted(row.flops for row in classes)
    matrix = view.confusion()
    for truth in range(10):
        for answered in range(10):
            wanted = sum(
                int(record.label[i]) == truth and int(replay.prediction[i]) == answered and int(replay.exit[i]) < 4
                for i in range(len(record))
            )
            assert matrix[truth, answered] == wanted
    for row in view.mistakes():
        assert matrix[NASTY.index(row.label), NASTY.index(row.prediction)] == row.samples >= row.network_wrong


def test_the_gallery_shows_the_highest_and_the_lowest_confidences():
    """Every image is a level of grey of its own, and confidence rises with its number."""
    count, costs = 40, e2cm.Costs((1, 1), (0,), ("only",))
    confidence = torch.linspace(0.01, 0.99, count)[:, None].repeat(1, 2)
    prediction, label = torch.zeros(count, 2, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    record = e2cm.Record(confidence, prediction, label, costs)
    levels = torch.linspace(0, 1, count)[:, None, None, None].expand(count, 1, 4, 4)
    loader = [(levels[:15], label[:15]), (levels[15:], label[15:])]
    left, stayed = build_gallery(record, record.replay([0.5]), ["0"], loader, lambda images: images)

    def numbers(pictures):
        found = []
        for picture in pictures:
            kind, _, code = picture.source.partition(",")
            assert kind == "data:image/png;base64"
            pixel = Image.open(io.BytesIO(base64.b64decode(code))).getpixel((0, 0))
            found.append(round(pixel / 255 * (count - 1)))
        return found

    assert (left.name, left.leavers, stayed.name, stayed.leavers) == ("only", 20, "", 20)
    assert numbers(left.most_confident) == [39, 38, 37, 36, 35, 34] and numbers(left.least_confident) == [
        25,
        24,
        23,
        22,
        21,
        20,
    ]
    assert numbers(stayed.most_confident) == [19, 18, 17, 16, 15, 14] and numbers(stayed.least_confident) == [
        5,
        4,
        3,
        2,
        1,
        0,
    ]


def test_a_split_curve_is_evaluated_on_samples_that_were_not_searched(made):
    _, ee, record = made
    split = report.SplitCurve(ee, record)
    assert len(split.test_record) == 100
    point = split.best_within(0.8)
    replay = split.test_record.replay(point.thresholds)
    assert (point.flops, point.accuracy) == (replay.flops, replay.accuracy)
    assert torch.equal(point.thresholds, split.search_curve.best_within(0.8).thresholds)
    assert split.best_within(0.0) is None
    with pytest.raises(ValueError, match="at least 2"):
        report.SplitCurve(ee, record.part([0]))


def test_times_are_ratios_within_a_round():
    now = [0.0]

    def way(seconds):
        def run():
            now[0] += next(seconds)

        return run

    ours, base = iter([99.0, 1.0, 4.0, 9.0]), iter([99.0, 2.0, 4.0, 6.0])
    seconds = timing.time_interleaved({"ours": way(ours), "base": way(base)}, 3, clock=lambda: now[0])
    assert seconds["ours"].tolist() == [1, 4, 9] and seconds["base"].tolist() == [2, 4, 6]
    found = timing.ratio(seconds["ours"], seconds["base"])
    assert (found.median, found.p10, found.p90) == pytest.approx((1.0, 0.6, 1.4))
    with pytest.raises(ValueError, match="`rounds` is 0"):
        timing.time_interleaved({}, 0)


def test_measuring_leaves_the_thresholds_as_they_were(made):
    _, ee, _ = made
    before = ee.thresholds.clone()
    found = report.measure_times(ee, networks.images(4), {"all leave": torch.full((4,), -math.inf)}, rounds=2)
    assert torch.equal(ee.thresholds, before) and found["all leave"].median > 0
    with pytest.raises(ValueError, match="shape"):
        report.measure_times(ee, networks.images(4), {"wrong": torch.zeros(3)}, rounds=1)
    assert torch.equal(ee.thresholds, before)


def test_what_cannot_be_reported(made, tmp_path):
    _, ee, _ = made
    (tmp_path / "old.html").write_text("old")
    with pytest.raises(ValueError, match="`classes` has 2 names; wanted 10"):
        report.write(tmp_path / "old.html", ee, networks.loader(20, 10), classes=["a", "b"], progress=False)
    with pytest.raises(FileNotFoundError):
        report.write(tmp_path / "no" / "r.html", ee, networks.loader(20, 10), batch_size=2, progress=False)
    assert (tmp_path / "old.html").read_text() == "old"
