import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from support.helpers import same_bits
from support.small import CLASSES, SHAPE, Net, bits_of, digits, images, trained
from torch import nn
from torch.nn import functional as F

import e2cm_ext as e2cm
from e2cm_ext.methods import training
from e2cm_ext.methods.learned_head import LearnedHead
from e2cm_ext.methods.training import feature_cache
from e2cm_ext.methods.training.loop import set_epoch

ALONE = 1e-6  # how far the mean of two processes' gradients may be from the gradient of the whole batch, of weights


class Averages(LearnedHead):
    def __init__(self, num_classes, feature_shape):
        super().__init__(num_classes, feature_shape)
        self.linear = nn.Linear(feature_shape[0], num_classes)

    def squeeze(self, x):
        return x.mean((2, 3))

    def outputs(self, squeezed):
        return self.linear(squeezed)


class Whole(LearnedHead):
    """Needs the features as they are, with a layer that must remember them for its gradient."""

    def __init__(self, num_classes, feature_shape):
        super().__init__(num_classes, feature_shape)
        self.conv = nn.Conv2d(feature_shape[0], num_classes, 1)

    def outputs(self, squeezed):
        return (self.conv(squeezed.sigmoid()).mean((2, 3)), squeezed.mean((1, 2, 3)))


def network(head=Averages, model=None):
    model = trained() if model is None else model  # which may draw numbers of its own
    with training.seeded(3):
        return e2cm.EarlyExit(model, torch.zeros(1, *SHAPE), head=head)


def loss(outputs, labels, epoch):
    logits = [out[0] if isinstance(out, tuple) else out for out in outputs]
    return torch.stack([F.cross_entropy(each, labels) for each in logits]).sum()


def train(ee, loader, *, epochs=3, lr=1e-2, module=None, **options):
    module = module or training.ExitHeads(ee)
    optimizer = torch.optim.Adam(module.parameters(), lr)
    prepare = training.identity if isinstance(module, training.Joint) else training.Features(ee)
    losses = training.run(
        module,
        loader,
        loss,
        epochs=epochs,
        optimizer=optimizer,
        schedule=training.step_decay(optimizer, epochs, (0.5,)),
        prepare=prepare,
        progress=False,
        **options,
    )
    training.finish(ee)
    return losses


def same_state(a, b):
    return all(same_bits(x, y) for x, y in zip(bits_of(a).values(), bits_of(b).values(), strict=True))


class Shuffled:
    """As a DataLoader does it: the order, and noise, from torch's default generator."""

    def __init__(self, batches=None, slow=0.0):
        self.x, self.y = (torch.cat(column) for column in zip(*(batches or digits()[0]), strict=True))
        self.slow = slow

    def __len__(self):
        return math.ceil(len(self.y) / 100)

    def __iter__(self):
        for rows in torch.randperm(len(self.y)).split(100):
            time.sleep(self.slow)
            yield self.x[rows] + 0.01 * torch.randn(len(rows), *SHAPE), self.y[rows]


# ---- what is trained ------------------------------------------------------------------------------------------------


def test_heads_learn_and_the_network_does_not():
    model = trained()
    before = bits_of(model)
    ee = network(model=model)
    for head in ee.heads:
        head.fitted = True
    at_first = ee.record(digits()[2], progress=False).accuracy
    losses = train(ee, Shuffled(), epochs=4)
    after = ee.record(digits()[2], progress=False).accuracy
    assert losses[-1] < losses[0]
    assert (after[2:4] > 0.85).all() and (at_first[2:4] < 0.3).all(), f"{at_first} {after}"
    assert after[-1] == at_first[-1]
    # Batch normalisation's statistics, and its count of batches, too.
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in ee.modules())
    assert all(p.grad is None for p in model.parameters())


def test_no_gradient_is_computed_in_a_network_that_does_not_change():
    ee = network()
    features = training.Features(ee)(images(5))
    assert not any(x.requires_grad for x in features)
    outputs = training.ExitHeads(ee)(features)
    assert all(x.requires_grad for x in outputs[:-1])


def test_features_are_what_heads_would_see():
    """The next stage overwrites them: ReLU in place."""
    ee = network(Whole)
    x = images(6)
    expected = list(e2cm.runtime.cascade.scores(ee.stages, ee.heads, x.clone()))
    outputs = training.ExitHeads(ee)(training.Features(ee)(x.clone()))
    found = [outputs[j][0] for j in range(len(ee.heads))] + [outputs[-1]]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.log_softmax(1), b, rtol=1e-5, atol=1e-6)


def test_joint_training_moves_everything_and_matches_plain_torch():
    """Its gradients, against those of a network written down by hand."""
    ee = network(Whole)
    joint = training.Joint(ee)
    joint.train()
    x, y = next(iter(digits()[0]))
    loss(joint(x.clone()), y, 0).backward()
    plain = Net()
    plain.load_state_dict(trained().state_dict())
    plain.drop.p = 0.0
    ours = {name: p.grad for name, p in ee.stages.parts.named_parameters()}
    assert all(gradient is not None for gradient in ours.values())
    assert joint.training and any(m.training for m in ee.stages.modules() if isinstance(m, nn.BatchNorm2d))
    # dropout sits behind the last exit: with it off, all gradients are determined
    ee2 = network(Whole)
    for module in ee2.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    joint2 = training.Joint(ee2)
    joint2.train()
    loss(joint2(x.clone()), y, 0).backward()
    heads = [head.eval() for head in network(Whole).heads]
    plain.train()
    out = []
    z = plain.stem(x.clone())
    out.append(heads[0].outputs(z.clone()))
    z = plain.block1(z.clone())
    out.append(heads[1].outputs(z.clone()))
    z = plain.block2(plain.down(z.clone()))
    out.append(heads[2].outputs(z.clone()))
    z = plain.block3(z.clone())
    out.append(heads[3].outputs(z.clone()))
    loss([*out, plain.classifier(z.mean((2, 3)))], y, 0).backward()
    by_name = dict(plain.named_parameters())
    grads = {name.partition(".")[2]: p.grad for name, p in ee2.stages.parts.named_parameters()}
    assert grads.keys() == by_name.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, by_name[name].grad, rtol=1e-3, atol=1e-5)


def test_joint_training_learns():
    model = Net().eval()
    ee = network(model=model)
    losses = train(ee, Shuffled(), epochs=3, module=training.Joint(ee))
    assert losses[-1] < 0.7 * losses[0]
    assert ee.record(digits()[2], progress=False).accuracy[-1] > 0.6


def test_only_heads_that_learn_can_be_trained():
    ee = e2cm.EarlyExit(trained(), torch.zeros(1, *SHAPE), head="class_means")
    for kind in (training.ExitHeads, training.Joint, training.Features):
        with pytest.raises(TypeError, match="head at 'stem' is a ClassMeans; wanted one that learns by gradients"):
            kind(ee)
    with pytest.raises(TypeError, match="learns by gradient descent"):
        network().fit(digits()[0], progress=False)


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    runs = []
    for seed in (0, 0, 1):
        ee = network()
        torch.manual_seed(len(runs))  # the caller's own generator matters nowhere, and is left as it was
        state = torch.get_rng_state()
        train(ee, Shuffled(), epochs=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        runs.append(ee.heads)
    assert same_state(runs[0], runs[1])
    assert not same_state(runs[0], runs[2])


class _Stop(Exception):
    pass


class Failing(Shuffled):
    def __init__(self, after):
        super().__init__()
        self.left = after

    def __iter__(self):
        for batch in super().__iter__():
            if self.left == 0:
                raise _Stop
            self.left -= 1
            yield batch


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("after", [3, 9, 14])
def test_a_run_goes_on_with_the_bits_it_would_have_had(tmp_path, after, joint):
    whole, broken = network(), network()
    modules = [training.Joint(ee) if joint else None for ee in (whole, broken)]
    losses = train(whole, Shuffled(), module=modules[0])
    with pytest.raises(_Stop):
        train(broken, Failing(after), checkpoint=tmp_path / "c", checkpoint_interval=0, module=modules[1])
    again = network()
    module = training.Joint(again) if joint else None
    resumed = train(again, Shuffled(), checkpoint=tmp_path / "c", checkpoint_interval=0, module=module)
    assert same_state(whole, again)
    assert resumed == losses
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_killed_process_goes_on_with_the_bits_it_would_have_had(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}
            import torch
            from test_training import Shuffled, network, train
            ee = network()
            losses = train(ee, Shuffled(slow=0.02), checkpoint={str(tmp_path / "c")!r}, checkpoint_interval=0)
            torch.save([ee.heads.state_dict(), losses], {str(tmp_path / "end")!r})
            """
        )
    )
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    job = subprocess.Popen([sys.executable, script], env=environment)
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "c").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    assert (tmp_path / "c").exists() and not (tmp_path / "end").exists()
    position = torch.load(tmp_path / "c", weights_only=True)["position"]
    assert position[0] < 3
    torch.set_num_threads(1)
    whole, again = network(), network()
    losses = train(whole, Shuffled())
    assert train(again, Shuffled(), checkpoint=tmp_path / "c") == losses
    assert same_state(whole.heads, again.heads)


def test_a_finished_run_is_not_run_again(tmp_path):
    ee, again = network(), network()
    losses = train(ee, Shuffled(), checkpoint=tmp_path / "c")
    assert train(again, [], checkpoint=tmp_path / "c") == losses
    assert same_state(ee.heads, again.heads)


def test_checkpoints_of_others_are_refused(tmp_path):
    ee = network()
    train(ee, Shuffled(), epochs=1, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match="of another training"):
        train(network(), Shuffled(), epochs=2, checkpoint=tmp_path / "c")
    whole = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no checkpoint, or damaged: delete it"):
        train(network(), Shuffled(), epochs=1, checkpoint=tmp_path / "c")


def test_a_loss_that_is_no_number_is_said(tmp_path):
    bad = [(x * math.nan, y) for x, y in digits()[0]]
    with pytest.raises(ValueError, match=r"loss became nan in epoch 1"):
        train(network(), bad, checkpoint=tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match="no sample; it may be used up"):
        train(network(), iter(digits()[0]))


def test_labels_are_looked_at():
    x, y = digits()[0][0]
    for bad, kind, message in (
        (y + CLASSES - 1, ValueError, "batch 1 has a label 1[0-8]; wanted 0 to 9"),
        (torch.full_like(y, -100), ValueError, "batch 1 has a label -100"),  # which cross_entropy would pass over
        (y.float(), TypeError, "labels in batch 1 are torch.float32"),
        (y[1:], ValueError, r"labels in batch 1 have shape \[99\]; wanted \[100\]"),
    ):
        with pytest.raises(kind, match=message):
            train(network(), [(x, y), (x, bad)], num_classes=CLASSES)
    ee, twin = network(), network()
    losses = train(ee, [(x, y)], num_classes=CLASSES)
    assert train(twin, [(x[:0], y[:0]), (x, y.int())], num_classes=CLASSES) == losses
    assert same_state(ee.heads, twin.heads)


@pytest.mark.parametrize("epochs", [-1, 1.5, "2", True, None])
def test_epochs_are_whole_numbers(epochs):
    module = training.ExitHeads(network())
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    with pytest.raises(ValueError, match="`epochs` is"):
        training.run(module, digits()[0], loss, epochs=epochs, optimizer=optimizer, progress=False)


def test_a_checkpoint_has_a_folder_before_there_is_work_to_lose(tmp_path):
    class Untouched:
        def __iter__(self):
            raise AssertionError

    with pytest.raises(FileNotFoundError, match=r"`checkpoint` is .*there is no such folder"):
        train(network(), Untouched(), checkpoint=tmp_path / "no" / "c")


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_in_mixed_precision_the_forward_pass_is_short_and_the_weights_are_not(precision):
    seen = []

    class Watching(Averages):
        def outputs(self, squeezed):
            out = super().outputs(squeezed)
            seen.append(out.dtype)
            return out

    ee = network(Watching)
    seen.clear()  # FLOPs have been counted
    losses = train(ee, digits()[0], epochs=2, precision=precision)
    assert losses[1] < losses[0]
    assert set(seen) == {precision}
    assert {p.dtype for p in ee.heads.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(100, {0: 1, 34: 1, 35: 0.1, 59: 0.1, 60: 0.01, 99: 0.001}), (2, {0: 1, 1: 0.01}), (1, {0: 1})],
)
def test_learning_rates_fall_where_they_should(epochs, expected):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    schedule = training.step_decay(optimizer, epochs, (0.35, 0.6, 0.85))
    seen = []
    for _ in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert {epoch: seen[epoch] for epoch in expected} == pytest.approx(expected)


def test_epochs_are_announced():
    told = []

    class Told(list):
        def set_epoch(self, epoch):
            told.append(epoch)

    train(network(), Told(digits()[0]), epochs=2)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(4), torch.zeros(4)))
    loader.batch_sampler.set_epoch = told.append
    set_epoch(loader, 7)
    assert told == [0, 1, 7]


# ---- several processes ----------------------------------------------------------------------------------------------


def test_two_processes_train_as_one(tmp_path):
    """Each on its half of every batch: the same gradients, up to rounding; and the same weights in both, to the bit."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}
            import torch
            import torch.distributed as dist
            from support.small import digits
            from test_training import network, train
            from e2cm_ext.methods import training
            dist.init_process_group("gloo")
            torch.set_num_threads(1)
            own, _ = training.rank_and_world_size()
            ee = network()
            cached = training.cache(ee, digits()[0], batch_size=60, progress=False)
            losses = train(ee, cached, epochs=2, checkpoint={str(tmp_path / "c")!r})
            joint = network()
            halves = [(x[own::2], y[own::2]) for x, y in digits()[0]]
            train(joint, halves, epochs=1, module=training.Joint(joint))
            torch.save([ee.heads.state_dict(), joint.state_dict()], {str(tmp_path)!r} + f"/end{{own}}")
            dist.destroy_process_group()
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        command, env=dict(os.environ, OMP_NUM_THREADS="1"), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ends = [torch.load(tmp_path / f"end{own}", weights_only=True) for own in (0, 1)]
    for part in (0, 1):
        learned = {name: value for name, value in ends[0][part].items() if "running" not in name}
        assert all(same_bits(value, ends[1][part][name]) for name, value in learned.items())
    torch.set_num_threads(1)  # as they do
    alone = network()
    train(alone, training.cache(alone, digits()[0], batch_size=60, progress=False), epochs=2)
    for name, value in alone.heads.state_dict().items():
        torch.testing.assert_close(ends[0][0][name], value, rtol=1e-4, atol=1e-4)
    assert not same_state(network().heads, alone.heads)


# ---- features that are kept -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kept_features_are_those_of_the_network(tmp_path, dtype):
    ee = network()
    batches = digits()[0]
    kept = training.cache(ee, batches, tmp_path / "f", dtype=dtype, progress=False)
    held = training.cache(ee, batches, dtype=dtype, progress=False)
    x, y = (torch.cat(column) for column in zip(*batches, strict=True))
    expected = training.Features(ee)(x)
    for cached in (kept, held):
        assert torch.equal(cached.labels, y)
        for a, b in zip(cached.features, expected, strict=True):
            torch.testing.assert_close(a.float(), b.to(dtype).float(), rtol=2e-3, atol=1e-5)
    for a, b in zip(kept.features, held.features, strict=True):
        assert same_bits(a, b)
    again = training.cache(ee, [], tmp_path / "f", dtype=dtype)  # the loader is not asked
    for (a, p), (b, q) in zip(again, held, strict=True):
        assert torch.equal(p, q) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_training_on_kept_features_is_training_on_images():
    on_images, on_features = network(), network()
    cached = training.cache(on_features, digits()[0], progress=False)
    x, y = (torch.cat(column) for column in zip(*digits()[0], strict=True))

    class SameOrder(training.Cached):
        def batch(self, rows):
            return x[rows], y[rows]

    train(on_images, SameOrder(cached.features, cached.labels), epochs=2)
    train(on_features, cached, epochs=2)
    for a, b in zip(on_images.heads.parameters(), on_features.heads.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_every_process_has_samples_in_every_batch_of_kept_features(monkeypatch):
    cached = training.Cached([torch.arange(9.0)[:, None]], torch.zeros(9, dtype=torch.int64), batch_size=4)
    shares = []
    for own in range(3):
        monkeypatch.setattr(feature_cache, "rank_and_world_size", lambda own=own: (own, 3))
        shares.append([features[0].flatten().tolist() for features, _ in cached])
    assert all(len(batch) > 0 for share in shares for batch in share)
    whole = [sorted({x for share in shares for x in share[j]}) for j in range(3)]
    assert [len(rows) for rows in whole] == [4, 4, 1] and set().union(*whole) == set(range(9))
    assert [len(share[0]) for share in shares] == [2, 1, 1]


def test_an_epoch_takes_every_sample_once_in_some_variant():
    labels = torch.arange(50) % CLASSES
    features = [torch.arange(150.0)[:, None]]
    cached = training.Cached(features, labels.repeat(3), batch_size=16, seed=1, variants=3)
    assert len(cached) == len(list(cached)) == 4
    epochs = []
    for epoch in (0, 1, 0):
        cached.set_epoch(epoch)
        rows = torch.cat([x[0][:, 0] for x, _ in cached]).long()
        assert torch.equal((rows % 50).sort().values, torch.arange(50))
        assert (rows // 50).bincount(minlength=3).min() > 5
        assert all(torch.equal(labels[x[0][:, 0].long() % 50], y) for x, y in cached)
        epochs.append(rows)
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])
    with pytest.raises(ValueError, match="`variants` is 2"):
        training.Cached(features, labels.repeat(3), variants=2)


def test_features_of_others_are_refused_and_nothing_half_done_is_left(tmp_path):
    ee = network()
    training.cache(ee, digits()[0], tmp_path / "f", progress=False)
    with pytest.raises(ValueError, match="features of another network or for other heads"):
        training.cache(network(Whole), digits()[0], tmp_path / "f", progress=False)

    def failing():
        yield digits()[0][0]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        training.cache(ee, failing(), tmp_path / "g", progress=False)
    with pytest.raises(ValueError, match="the loader gave no batch"):
        training.cache(ee, [], tmp_path / "g", progress=False)
    (tmp_path / "h").mkdir()
    with pytest.raises(ValueError, match="holds no features"):
        training.cache(ee, digits()[0], tmp_path / "h", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "h"]
    assert json.loads((tmp_path / "f" / "about.json").read_text())["dtype"] == "float32"
