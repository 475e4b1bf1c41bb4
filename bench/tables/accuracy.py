"""Accuracy: of trained networks, of clusters, of DEC."""

from __future__ import annotations

from ..markdown import table as grid
from .reading import accuracy_at, fixed, points, read, table

ON_TRAINING, ON_HELD_OUT = "thresholds from training images", "thresholds from held-out images"


@table(
    "curves-resnet56-cifar10",
    "curves-whitened-resnet56-cifar10",
    "curves-micronet-cifar100",
    "curves-whitened-micronet-cifar100",
)
def accuracy() -> str:
    resnet, micronet = read("curves-whitened-resnet56-cifar10"), read("curves-whitened-micronet-cifar100")
    columns = [
        points(read("curves-resnet56-cifar10"), ON_TRAINING),
        points(resnet, ON_TRAINING),
        points(resnet, f"6 exits and {ON_TRAINING}"),
        points(read("curves-micronet-cifar100"), ON_HELD_OUT),
        points(micronet, ON_HELD_OUT),
        points(micronet, f"5 exits and {ON_HELD_OUT}"),
    ]
    header = ["FLOPs"]
    header += [f"ResNet-56: {way}" for way in ("class means", "whitened means", "whitened means, 6 exits")]
    header += [f"MobileNetV3-like: {way}" for way in ("class means", "whitened means", "whitened means, 5 exits")]
    budgets = [i / 10 for i in range(1, 11)]
    return grid(header, [[fixed(b, 1), *(accuracy_at(b, column) for column in columns)] for b in budgets], left=0)


@table(
    "curves-whitened-resnet56-cifar10",
    "curves-whitened-resnet56-cifar10-3-exits",
    "curves-whitened-resnet20-cifar10",
    "curves-whitened-micronet-cifar100",
)
def accuracy_lossless() -> str:
    chosen = [
        ("ResNet-56", "curves-whitened-resnet56-cifar10", ON_TRAINING),
        ("ResNet-56, 6 exits", "curves-whitened-resnet56-cifar10", f"6 exits and {ON_TRAINING}"),
        ("ResNet-56, 3 exits", "curves-whitened-resnet56-cifar10-3-exits", f"3 exits and {ON_TRAINING}"),
        ("ResNet-20", "curves-whitened-resnet20-cifar10", ON_TRAINING),
        ("MobileNetV3-like", "curves-whitened-micronet-cifar100", ON_HELD_OUT),
        ("MobileNetV3-like, 5 exits", "curves-whitened-micronet-cifar100", f"5 exits and {ON_HELD_OUT}"),
    ]
    rows = []
    for label, file, key in chosen:
        outcome = read(file)[key]
        lossless, best = outcome["lossless at"], points(read(file), key)[-1]
        at_best = f"{fixed(best['accuracy'], 4)} at {fixed(best['flops'], 2)}"
        cheapest = fixed(lossless, 2) if lossless else "not reached"
        rows.append([label, fixed(outcome["network"], 4), cheapest, at_best])
    header = ["network", "its own accuracy", "FLOPs for a loss of at most 0.001", "accuracy with budget 1.0"]
    return grid(header, rows)


@table("curves-whitened-resnet20-cifar10", "alternatives-resnet56-cifar10")
def accuracy_smaller() -> str:
    small, ratio = read("curves-whitened-resnet20-cifar10"), flops_of_resnet20()
    rows = [
        [fixed(ratio * point["budget"], 2), fixed(point["budget"], 1), fixed(point["accuracy"], 3)]
        for point in points(small, ON_TRAINING)
        if round(point["budget"], 2) in (0.3, 0.5, 0.7, 0.8)
    ]
    rows.append([fixed(ratio, 2), "1.0, no exits", fixed(small["accuracy of the network"], 3)])
    return grid(["FLOPs, as a fraction of the ResNet-56's", "of the ResNet-20's", "accuracy"], rows, left=0)


def flops_of_resnet20() -> float:
    return float(read("alternatives-resnet56-cifar10")["rows"]["cifar10_resnet(20)"]["flops"])


@table("clusters-resnet20-cifar10")
def clusters() -> str:
    found, budgets = read("clusters-resnet20-cifar10"), (0.3, 0.5, 0.7, 0.9)
    ways = [("the network's own answers", "own answers"), ("ten clusters of its logits", "clusters")]
    rows = []
    for label, key in ways:
        whole = found[key]["accuracy at the exits"][-1]
        rows.append([label, *(accuracy_at(b, found[key]["points"]) for b in budgets), fixed(whole, 3)])
    return grid(["exits were fitted to", *map(str, budgets), "no early exit"], rows)


@table("clusters-resnet20-cifar10")
def clusters_exits() -> str:
    found = read("clusters-resnet20-cifar10")
    ways = [
        ("ten clusters of the network's logits", found["clusters"]),
        ("k-means of the features at each exit", found["k-means of its own"]),
    ]
    rows = [[label, *(fixed(x, 2) for x in way["accuracy at the exits"][:6])] for label, way in ways]
    return grid(["clusters", *(f"`{name}`" for name in found["exits"])], rows)


@table("dec-mnist")
def dec() -> str:
    found = read("dec-mnist")
    rows = [
        [f"{p['budget']:g}", fixed(p["flops"], 3), *(fixed(p[key], 3) for key in ("accuracy", "nmi", "ari"))]
        for p in found["mean"]
    ]
    seeds = found["seeds"]
    whole = [next(e for e in seed["exits"] if e["exit"] == "large") for seed in seeds]
    means = [fixed(sum(e[key] for e in whole) / len(seeds), 3) for key in ("accuracy", "nmi", "ari")]
    rows.append(["large encoder alone", "1.000", *means])
    return grid(["FLOPs asked for", "FLOPs on test images", "accuracy", "NMI", "ARI"], rows)


@table("dec-mnist")
def dec_time() -> str:
    timed = next(seed["time"] for seed in read("dec-mnist")["seeds"] if "time" in seed)
    rows = [
        [fixed(t["flops"], 2), f"{fixed(t['time'], 2)} [{fixed(t['10th'], 2)}, {fixed(t['90th'], 2)}]"] for t in timed
    ]
    return grid(["FLOPs", "time / the large encoder's"], rows, left=0)
