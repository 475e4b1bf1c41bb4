"""python -m bench methods at a small size: it runs, its figures add up, and it continues where it was stopped."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small import all_of, digits

sys.path.append(str(Path(__file__).parents[2]))  # at the end: e2cm_ext is the installed one
from bench import methods
from bench.methods import baselines, results, workspace
from e2cm_ext.methods import sdn, training


def arguments(folder: Path, *more: str) -> list[str]:
    train, test = all_of(digits()[0] + digits()[1]), all_of(digits()[2])
    arrays = {}
    for name, (x, y) in (("train", train), ("test", test)):
        arrays[f"x_{name}"] = ((x[:, 0] * 0.38 + 0.3) * 16 * 15).round().to(torch.uint8).numpy()
        arrays[f"y_{name}"] = y.numpy()
    np.savez(folder / "digits.npz", **arrays)
    (folder / "networks.py").write_text("from support.small import trained\n")
    images = ["--mean", str(0.3 * 16 / 17), "--std", str(0.38 * 16 / 17), "--batch", "100", "--no-mirror"]
    images += ["--exits", "0.05", "0.3", "0.7"]
    where = [str(folder / "networks.py"), "trained()", str(folder / "digits.npz")]
    return [*where, *images, "--work", str(folder / "work"), "--held-out", "300", *more]


def run(folder, *more):
    methods.main(arguments(folder, "--json", str(folder / "out.json"), *more))
    return json.loads((folder / "out.json").read_text())


def test_it_runs_and_continues_where_it_was_stopped(monkeypatch, tmp_path, capsys):
    chosen = ("--methods", "e2cm", "sdn", "joined", "--budgets", "one", "six", "--long", "2")

    class Killed(Exception):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setitem(baselines.METHODS, "sdn, a threshold each", baselines.Method(killed, "sdn"))
        with pytest.raises(Killed):
            run(tmp_path, *chosen)
    with monkeypatch.context() as patch:
        patch.setitem(baselines.METHODS, "e2cm, raw", baselines.Method(killed, "e2cm", trained=False))  # done already
        result = run(tmp_path, *chosen)
    rows = {(row["method"], row["training"]): row for row in result["rows"]}
    families = [m for m in baselines.METHODS.values() if m.family in ("e2cm", "sdn", "joined")]
    assert len(rows) == sum(2 if method.trained else 1 for method in families)
    assert result["trained on"] == 1000 and result["thresholds from"] == 300
    assert result["accuracy of the network"] > 0.9
    best = rows["sdn", "six"]["points"][-1]
    assert best["accuracy"] > 0.85 and 0 < best["flops"] < 0.9
    assert rows["sdn", "six"]["parameters"] == rows["sdn", "one"]["parameters"]
    assert rows["sdn", "six"]["points"][-1]["accuracy"] > rows["sdn", "one"]["points"][-1]["accuracy"]
    assert "| sdn | six |" in capsys.readouterr().out


def test_records_from_features_are_those_of_the_network():
    ee = sdn.build(methods_model(), torch.zeros(1, 1, 8, 8), exits="blocks")
    sdn.train(ee, digits()[0][:3], epochs=1, progress=False)
    cached = training.cache(ee, digits()[2], progress=False)
    found, expected = results.record_from(cached, ee), ee.record(digits()[2], progress=False)
    torch.testing.assert_close(found.confidence, expected.confidence, rtol=1e-4, atol=1e-5)
    assert (found.prediction == expected.prediction).double().mean() > 0.999
    assert found.costs == expected.costs


def methods_model():
    from support.small import trained

    return trained()


def test_budgets_between_corners_are_shared():
    """Corners at .2 and .6 of FLOPs; the option between them lies below the line; half of each at .4."""
    options = [
        results.Option(0.6, 0.9, 0.62, 0.88),
        results.Option(0.2, 0.5, 0.22, 0.48),
        results.Option(0.4, 0.6, 0.41, 0.99),
    ]
    found = results.at_budgets([0.1, 0.2, 0.4, 0.75], options)
    assert found[0] is None
    assert found[1] == pytest.approx({"budget": 0.2, "flops": 0.22, "accuracy": 0.48})
    assert found[2] == pytest.approx({"budget": 0.4, "flops": 0.42, "accuracy": 0.68})
    assert found[3] == pytest.approx({"budget": 0.75, "flops": 0.62, "accuracy": 0.88})


def test_altered_images_are_shifted_and_mirrored_ones():
    torch.manual_seed(0)
    x = torch.rand(40, 2, 9, 9) + 1
    batches = workspace.Augmented(x, torch.arange(40), 16, True)
    seen = set()
    for images, numbers in batches:
        for image, number in zip(images, numbers.tolist(), strict=True):
            padded = torch.nn.functional.pad(x[number], (4, 4, 4, 4))
            ways = [
                (mirrored, down, right)
                for mirrored in (False, True)
                for down in range(9)
                for right in range(9)
                if torch.equal(
                    image,
                    (torch.nn.functional.pad(x[number].flip(2), (4, 4, 4, 4)) if mirrored else padded)[
                        :, down : down + 9, right : right + 9
                    ],
                )
            ]
            assert len(ways) == 1
            seen.add(ways[0])
    assert len(seen) > 30
    plain = torch.cat([y for _, y in workspace.Augmented(x, torch.arange(40), 16, False)])
    assert torch.equal(plain.sort().values, torch.arange(40)) and not torch.equal(plain, torch.arange(40))
