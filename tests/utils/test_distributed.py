"""Real processes under torch.distributed (gloo): the same heads, records, thresholds and figures as one process alone;
one without data does not keep the others waiting, and neither does one that fails or is gone."""

import signal
import subprocess
import time

import pytest
import torch
from support.distributed import HEADS, everything, loaders, of_clusters
from support.subprocesses import LIMIT, start_python, torchrun

from e2cm_ext.data.overlap import FittedImages, image_hashes

BEGIN = """
import datetime, os, sys, time
import torch, torch.distributed as dist
import e2cm_ext as e2cm
from support.distributed import *
torch.set_num_threads(1)
"""


SAME = f"""{BEGIN}
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
rank, folder = dist.get_rank(), sys.argv[1]
for name, mine in (("halves", loaders(rank, 2)), ("one has none", loaders(0, 1) if rank == 0 else ([], []))):
    torch.save(everything(*mine) | {{"clusters": of_clusters(mine[0])}}, f"{{folder}}/{{name}} {{rank}}.pt")
dist.destroy_process_group()
"""


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.subprocess
def test_torchrun_with_two_processes_gives_what_one_does(tmp_path):
    torchrun(SAME, tmp_path, tmp_path)
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
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        for rank in range(2):
            env = meeting | {"RANK": str(rank)}
            started.append(start_python(script, mode, folder, seconds, env=env, stderr=subprocess.STDOUT))
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


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.subprocess
def test_what_fails_in_one_process_fails_in_all(two_processes):
    first, second = two_processes("fails")
    said = [process.communicate(timeout=LIMIT)[0] for process in (first, second)]
    assert first.returncode == second.returncode == 0, said
    for what in ("fit", "record", "evaluate"):
        assert f"{what}: OSError the disk is gone" in said[1]
    assert "fit: RuntimeError fit, pass 1 of 2: process 1 of 2 has failed with OSError: the disk is gone" in said[0]
    assert "record: RuntimeError record: process 1 of 2 has failed with OSError: the disk is gone" in said[0]
    assert "evaluate: RuntimeError evaluate: process 1 of 2 has failed" in said[0]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.subprocess
def test_a_killed_process_is_an_error_in_the_others(two_processes):
    first, second = two_processes("is killed", seconds=60)
    wait_for(second, "in the middle")
    second.send_signal(signal.SIGKILL)
    start = time.monotonic()
    said, _ = first.communicate(timeout=LIMIT)
    assert time.monotonic() - start < 60
    assert "fit: RuntimeError process 0 of 2 cannot reach the others: one of them has ended" in said


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.subprocess
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
