"""What each of several processes fits, calibrates and keeps."""

from __future__ import annotations

import torch
from torch import distributed as dist

import e2cm_ext as e2cm
from support.networks import SHAPE, loader, net

HEADS = ("class_means", "whitened_means")


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


def _fit_heads(rank, file, makes, x, labels, shares, channels_last, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    states = []
    for first in shares:
        mine = slice(0, first) if rank == 0 else slice(first, None)
        for make in makes:
            head = make()
            for pass_index in range(head.passes):
                if len(x[mine]):
                    some = x[mine].contiguous(memory_format=torch.channels_last) if channels_last[rank] else x[mine]
                    head.update(some, labels[mine], pass_index)
                head.finish(pass_index)
            states.append({name: tensor.numpy().copy() for name, tensor in head.state_dict().items()})
    queue.put((rank, states))
    dist.destroy_process_group()


def heads_of_two_processes(makes, x, labels, shares, folder, channels_last=(False, False)):
    """States of heads that two processes have fitted together, process by process.

    `makes`: functions without arguments that make a head; `shares`: for each round, how many samples process 0 has.
    """
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    arguments = (str(folder / "meeting"), makes, x, labels, shares, channels_last, queue)
    processes = [context.Process(target=_fit_heads, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    states = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [states[rank] for rank in range(2)]


def predict_in_worker(ee, x):
    """In a worker process, as servers are set up: one thread each."""
    torch.set_num_threads(1)
    return [column.clone() for column in ee.predict(x)]
