"""Real processes under torch.distributed (gloo): the same heads, records, thresholds and figures as one process alone;
one without data does not keep the others waiting, and neither does one that fails or is gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.small import SHAPE, loader, net

import e2cm_ext as e2cm
from e2cm_ext.data.overlap import FittedImages, image_hashes

HERE = Path(__file__).parent
LIMIT = 300  # seconds that processes may take, on a busy machine
HEADS = ("class_means", "whitened_means")
BEGIN = f"""
import datetime, os, sys, time
sys.path[:0] = {[str(HERE.parent), str(HERE)]!r}
import torch, torch.distributed as dist
import e2cm_ext as e2cm
from test_distributed import *
torch.set_num_threads(1)
"""


def loaders(rank, count):
    """To fit on and to find thresholds on: every count-th sample, from `rank` on."""
    parts = []
    for seed, size in ((0, 300), (1, 200)):
        x, y = (torch.cat(column) for column in zip(*loader(size, seed=seed), strict=True))
        x, y = x[rank::count], y[rank::count]
        parts.append(list(zip(x.split(25), y.split(25), strict=True)))
    return parts


def network(head):
    return e2cm.EarlyExit(net(), torch.zeros(1, *SHAPE), head=head)


def everything(fitted_on, held_out):
    """All that a fit and a calibration leave behind."""
    found = {}
    for head in HEADS:
        ee = network(head).fit(fitted_on, progress=False)
        record = ee.record(held_out, progress=False)
        point = ee.calibrate(held_out, flops=0.6, progress=False)
        evaluation = ee.evaluate(held_out, progress=False)
        found[head] = {
            "heads": ee.heads.state_dict(),
            "record": (record.confidence, record.prediction, record.label),
            "thresholds": ee.thresholds,
            "point": (point.flops, point.accuracy),
            "evaluation": (evaluation.accuracy, evaluation.flops, evaluation.exits),
        }
        timed = ee.calibrate(held_out, latency=0.9, batch_size=4, progress=False)  # everybody's own times would differ
        found[head]["timed"] = timed.thresholds
    return found


def of_clusters(fitted_on):
    """All that a fit to clusters leaves behind."""
    ee = network("class_means").fit(fitted_on, progress=False, labels=None, clusters=4)
    return {"heads": ee.heads.state_dict(), "centres": ee.stages[-1].centres.state_dict()}


SAME = f"""{BEGIN}
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
rank, folder = dist.get_rank(), sys.argv[1]
for name, mine in (("halves", loaders(rank, 2)), ("one has none", loaders(0, 1) if rank == 0 else ([], []))):
    torch.save(everything(*mine) | {{"clusters": of_clusters(mine[0])}}, f"{{folder}}/{{name}} {{rank}}.pt")
dist.destroy_process_group()
"""


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_torchrun_with_two_processes_gives_what_one_does(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SAME)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*run, str(script), str(tmp_path)],
        check=True,
        timeout=LIMIT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    torch.set_num_threads(1)  # as they do
    shares = [loaders(rank, 2) for rank in range(2)]
    fitted_on, held_out = ([*one, *other] for one, other in zip(*shares, strict=True))
    for name, alone in (
        ("halves", everything(fitted_on, held_out)),
        ("one has none", everything(*loaders(0, 1))),
    ):
        both = [torch.load(tmp_path / f"{name} {rank}.pt", weights_only=False) for rank in range(2)]
        for head in HEADS:
            close(both[1][head], both[0][head], 0)  # whatever they are, all processes agree on them
            expected, found = alone[head], both[0][head]
            del expected["timed"], found["timed"]
            if name == "one has none":
                close(found, expected, 0)
            else:
                for what in expected:
                    close(found[what], expected[what])
        close(both[1]["clusters"], both[0]["clusters"], 0)
        if name == "one has none":
            close(both[0]["clusters"], of_clusters(loaders(0, 1)[0]), 0)


APART = f"""{BEGIN}
rank, (mode, folder, seconds) = int(os.environ["RANK"]), sys.argv[1:]
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=float(seconds)))
fitted_on, held_out = loaders(rank, 2)

class Loader(list):
    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if rank == 1 and number == 2:
                print("in the middle", flush=True)
                if mode == "fails":
                    raise OSError("the disk is gone")
                time.sleep(1000)
            yield batch

ee = network("class_means")
before = {{name: value.clone() for name, value in ee.state_dict().items()}}
if mode in ("fails", "is killed"):
    try:
        ee.fit(Loader(fitted_on), progress=False)
    except Exception as error:
        print("fit:", type(error).__name__, error, flush=True)
    else:
        ee.save(f"{{folder}}/fitted.e2cm")
    assert all(torch.allclose(before[name], value, 0, 0, True) for name, value in ee.state_dict().items())
if mode != "is killed":
    ee.fit(fitted_on, progress=False)  # the group is as good as ever
    print("fitted", flush=True)
if mode == "fails":
    for what in (ee.record, ee.evaluate):
        try:
            what(Loader(held_out), progress=False)
        except Exception as error:
            print(what.__name__ + ":", type(error).__name__, error, flush=True)
    dist.barrier()  # gloo aborts a process that ends while another, which has not let go of it, is gone
    dist.destroy_process_group()
if mode == "does not come":
    try:
        ee.record(Loader(held_out), progress=False).save(f"{{folder}}/record")
    except Exception as error:
        print("record:", type(error).__name__, error, flush=True)
"""


@pytest.fixture
def two_processes(tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "out"
    script.write_text(APART)
    folder.mkdir()
    started = []

    def start(mode, seconds=60):
        arguments = [sys.executable, str(script), mode, str(folder), str(seconds)]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        for rank in range(2):
            environment = os.environ | meeting | {"RANK": str(rank), "OMP_NUM_THREADS": "1"}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen(arguments, env=environment, **pipes))
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()
    assert list(folder.iterdir()) == []  # nothing, and nothing half written


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"never said {text!r}")


def test_what_fails_in_one_process_fails_in_all(two_processes):
    first, second = two_processes("fails")
    said = [process.communicate(timeout=LIMIT)[0] for process in (first, second)]
    assert first.returncode == second.returncode == 0, said
    for what in ("fit", "record", "evaluate"):
        assert f"{what}: OSError the disk is gone" in said[1]
    assert "fit: RuntimeError fit, pass 1 of 2: process 1 of 2 has failed with OSError: the disk is gone" in said[0]
    assert "record: RuntimeError record: process 1 of 2 has failed with OSError: the disk is gone" in said[0]
    assert "evaluate: RuntimeError evaluate: process 1 of 2 has failed" in said[0]


def test_a_killed_process_is_an_error_in_the_others(two_processes):
    first, second = two_processes("is killed", seconds=60)
    wait_for(second, "in the middle")
    second.send_signal(signal.SIGKILL)
    start = time.monotonic()
    said, _ = first.communicate(timeout=LIMIT)
    assert time.monotonic() - start < 60
    assert "fit: RuntimeError process 0 of 2 cannot reach the others: one of them has ended" in said


def test_a_process_that_does_not_come_is_an_error_in_the_others(two_processes):
    first, second = two_processes("does not come", seconds=10)
    wait_for(second, "in the middle")
    said, _ = first.communicate(timeout=LIMIT)
    assert second.poll() is None  # it is still there
    assert "record: RuntimeError process 0 of 2 cannot reach the others" in said
    assert "timeout" in said


def test_what_several_have_seen_is_what_one_would_have():
    images = torch.rand(3000, 4, generator=torch.Generator().manual_seed(0))
    for count in (300, 3000):
        alone, parts = FittedImages(), [FittedImages(), FittedImages(), FittedImages()]
        alone.add(images[:count])
        parts[0].add(images[: count // 3])
        parts[2].add(images[count // 3 : count])
        merged = FittedImages.merge(parts)
        assert torch.equal(merged._hashes, alone._hashes)
        for some in (images, images[: count // 2], images[2500:]):
            expected = alone.overlap(image_hashes(some))
            assert merged.overlap(image_hashes(some)) == pytest.approx(expected, nan_ok=True)
