"""Packed class means and weights: the same bits as without, and never those of vectors that have changed."""

import copy
import math
import pickle

import pytest
import torch
from support.tensors import clusters, generator, sentinels, shuffled_ids

from e2cm_ext import Decisions, Statistics, native, ops
from e2cm_ext.heads import ClassMeans, PooledMeans, WhitenedMeans
from e2cm_ext.heads.rules import Confidence
from e2cm_ext.ops.packing import Packed, Packing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULE = Confidence()


def same(a, b):
    """The same bits, NaN included."""
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other) or (one.isnan() == other.isnan()).all()
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def everything(x, vectors, per_class, center, statistics=None):
    """All that the ops say of x. `vectors`: plain for both kinds of head, or packed with the center and without."""
    means, weight = vectors if isinstance(vectors, tuple) else (vectors, vectors)
    center = None if isinstance(means, Packed) else center
    rows, ids = x.shape[0], shuffled_ids(x.shape[0], x.shape[0])
    answers = [*ops.class_scores(x, means, per_class, center, statistics)]
    answers += [*ops.linear_scores(x, weight, per_class, statistics)]
    for threshold in (-math.inf, 0.1):
        out = sentinels(rows, len(per_class))
        answers += [*ops.exit_step(x, means, per_class, threshold, ids, out, center, statistics), *out]
        out = sentinels(rows, len(per_class))
        answers += [*ops.linear_step(x, weight, per_class, threshold, ids, out, statistics, rule="entropy"), *out]
    if statistics is None:
        answers.append(ops.class_distances(x, means, center))
    return answers


@pytest.mark.parametrize("classes", [7, 25, 100, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits(classes, dtype):
    for rows, dim in [(0, 33), (1, 700), (19, 1030), (40, 64)]:
        x, means, scale = clusters(rows, dim, classes, dtype, dtype, seed=classes + dim)
        center = means.float().mean(0)
        if rows:
            x[0, 3] = math.nan
        packed = ops.pack(means, center), ops.pack(means)
        same(everything(x, packed, scale, center), everything(x, means, scale, center))


@pytest.mark.parametrize("last", [False, True])
def test_maps_in_either_order_and_statistics_of_them(last):
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(9, 8, 6, 5, generator=generator(1)).contiguous(memory_format=order)
    means = torch.randn(30, 8, 6, 5, generator=generator(2)).contiguous(memory_format=order)
    scale, center = torch.rand(30, generator=generator(3)) + 15, means.mean(0)
    expected = everything(x, means, scale, center)
    for vectors in (means, means.contiguous(), means[::1]):  # in x's order, or packed in vain
        same(everything(x, (ops.pack(vectors, center), ops.pack(vectors)), scale, center), expected)
    wanted = Statistics(mean=(2, 2), rms=(1, 1), pairs=2)
    means = torch.randn(30, wanted.size((8, 6, 5)), generator=generator(4))
    packed = ops.pack(means, means.mean(0)), ops.pack(means)
    same(everything(x, packed, scale, means.mean(0), wanted), everything(x, means, scale, means.mean(0), wanted))


def test_vectors_and_centers_that_are_not_dense():
    x, means, scale = clusters(5, 600, 40, seed=1)
    wide = torch.zeros(40, 700)
    wide[:, :600] = means
    center = means.mean(0).double()
    packed = ops.pack(wide[:, :600], center), ops.pack(means.T.contiguous().T)
    same(everything(x, packed, scale, center), everything(x, means, scale, center))


def test_it_is_the_packed_numbers_that_are_looked_at():
    """Or the rest would prove nothing."""
    x, means, scale = clusters(5, 600, 40, seed=1)
    ids, out = torch.arange(5), Decisions.empty(5, 40)
    packed = ops.pack(means)
    packed.panels[48 * 8 :] = 0  # behind the norms, without which distances would be taken the long way
    assert not torch.allclose(ops.class_distances(x, packed), ops.class_distances(x, means), rtol=1e-2)
    assert not torch.allclose(ops.class_scores(x, packed, scale).log_probs, ops.class_scores(x, means, scale).log_probs)
    ops.exit_step(x, packed, scale, -math.inf, ids, out)
    assert not torch.allclose(out.log_probs, ops.class_scores(x, means, scale).log_probs)
    weight = ops.pack(means)
    weight.panels.zero_()
    assert (ops.linear_scores(x, weight, torch.zeros(40)).confidence == 1 / 40).all()
    ops.linear_step(x, weight, torch.zeros(40), -math.inf, ids, out)
    assert (out.confidence == 1 / 40).all()


def test_what_has_been_written_to_since_is_refused():
    x, means, scale = clusters(5, 600, 40, seed=1)
    center = means.mean(0)
    for change in (means, center):
        packed = ops.pack(means, center)
        ops.class_scores(x, packed, scale)
        change += 1
        with pytest.raises(ValueError, match="written to since they were packed: pack them again"):
            ops.class_scores(x, packed, scale)


def of_numpy(t):
    t.numpy()[:] = 7


def of_data(t):
    t.data.mul_(2)


def of_other_memory(t):
    t.data = t.data.clone() + 1


def of_other_order(t):
    t.data = t.data.contiguous(memory_format=torch.channels_last)


def of_swapping(t):
    torch.utils.swap_tensors(t, t + 1)


def of_inference(t):
    with torch.inference_mode():
        t.mul_(2)


def of_a_fused_optimizer(t):
    w = torch.nn.Parameter(t)  # the same memory
    w.grad = torch.ones_like(w)
    torch.optim.SGD([w], lr=0.1, fused=True).step()


def of_one_number(t):  # the 40th is none of those that are looked at: torch has counted
    t.view(-1)[40] += 1


def of_one_number_in_other_memory(t):
    other = t.clone()
    of_one_number(other)
    t.data = other


WRITES = [
    of_one_number,
    of_one_number_in_other_memory,
    of_numpy,
    of_data,
    of_other_memory,
    of_other_order,
    of_swapping,
    of_inference,
    of_a_fused_optimizer,
]


@pytest.mark.parametrize("write", WRITES)
def test_writes_are_noticed_also_where_torch_does_not_count(write):
    means = torch.randn(40, 8, 4, 4, generator=generator(1))
    x = torch.randn(3, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    packing = Packing()
    packed = packing.packed(means)
    ops.class_distances(x, packed)
    assert packing.packed(means) is packed
    write(means)
    same([ops.class_distances(x, packing.packed(means))], [ops.class_distances(x, means)])
    with pytest.raises(ValueError, match="written to since"):
        ops.class_distances(x, packed)


def test_a_center_of_inference_mode():
    with torch.inference_mode():
        x, means, _ = clusters(5, 600, 40, seed=1)
        center, packing = means.mean(0), Packing()
    means = means.clone()
    for _ in range(2):
        same([ops.class_distances(x, packing.packed(means, center))], [ops.class_distances(x, means, center)])
        with torch.inference_mode():
            center[5] += 3


def test_a_center_in_the_shape_of_maps_for_flat_means():
    x = torch.randn(5, 8, 4, 4)
    means, center = torch.randn(40, 128), torch.randn(8, 4, 4)
    same([ops.class_distances(x, ops.pack(means, center))], [ops.class_distances(x, means, center)])


def test_no_room_is_wasted_on_few_features():
    for classes, dim in [(1000, 16), (96, 520)]:
        assert ops.pack(torch.randn(classes, dim)).panels.nbytes < 1.2 * classes * dim * 4 + 10_000


@pytest.mark.slow
def test_packed_outside_of_what_is_compiled():
    x, means, scale = clusters(5, 600, 40, seed=1)
    packed = ops.pack(means)
    compiled = torch.compile(lambda x: ops.class_scores(x, packed, scale), fullgraph=True, backend="aot_eager")
    same(compiled(x), ops.class_scores(x, means, scale))


def test_wrong_arguments():
    x, means, scale = clusters(5, 600, 40, seed=1)
    center, ids, out = means.mean(0), torch.arange(5), Decisions.empty(5, 40)
    with pytest.raises(ValueError, match="`center` is given, but `means` are packed"):
        ops.exit_step(x, ops.pack(means, center), scale, 0.5, ids, out, center)
    with pytest.raises(ValueError, match="`weight` was packed with a center"):
        ops.linear_scores(x, ops.pack(means, center), scale)
    with pytest.raises(ValueError, match=r"`means` has shape \[40, 600\]; wanted"):
        ops.class_scores(x[:, 1:], ops.pack(means), scale)
    with pytest.raises(TypeError, match=r"`vectors` is torch\.float64; wanted float32"):
        ops.pack(means.double())
    with pytest.raises(TypeError, match="`vectors` is a list"):
        ops.pack([1.0])
    with pytest.raises(ValueError, match=r"`vectors` has shape \[0, 600\]; wanted a tensor \[classes, ...\]"):
        ops.pack(means[:0])
    with pytest.raises(ValueError, match=r"`center` is a torch.float32 tensor \[599\] on cpu; wanted floats in the"):
        ops.pack(means, center[1:])
    with pytest.raises(ValueError, match=r"`center` is a torch.int64 tensor"):
        ops.pack(means, center.long())
    with pytest.raises(ValueError, match=r"`center` is .* on meta; wanted floats .* on cpu"):
        ops.pack(means, center.to("meta"))
    with pytest.raises(ValueError, match=r"`vectors` has shape \[40\]; wanted a tensor \[classes, ...\]"):
        ops.pack(torch.ones(40))


def test_copies_and_pickles_pack_again():
    x, means, scale = clusters(5, 600, 40, seed=1)
    packed = ops.pack(means, means.mean(0))
    expected = ops.class_scores(x, packed, scale)
    assert "bytes" in repr(packed)
    assert "nothing to pack" in repr(ops.pack(means[:10]))
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert again.panels is not None
        same(ops.class_scores(x, again, scale), expected)


# ---- heads -----------------------------------------------------------------------------------------------------------


def fitted(make, seed, classes=30, head=None):
    head = make(classes, (16, 4, 4)) if head is None else head
    numbers = generator(seed)
    means = torch.randn(classes, 16, 4, 4, generator=numbers)
    labels = torch.arange(classes * 8) % classes
    x = means[labels] + 0.5 * torch.randn(len(labels), 16, 4, 4, generator=numbers)
    head.reset()
    for pass_index in range(head.passes):
        head.update(x, labels, pass_index)
        head.finish(pass_index)
    return head, x


def plain(head, x):
    """What the head says if nothing is packed."""
    if isinstance(head, WhitenedMeans):
        return ops.linear_scores(x, head.weight, head.bias, head.statistics).log_probs
    return ops.class_scores(x, head.means, head.scale, head.center, head.statistics).log_probs


@pytest.mark.parametrize("make", [ClassMeans, PooledMeans, WhitenedMeans])
def test_a_head_packs_once_and_again_when_it_has_changed(make, monkeypatch):
    count = []
    pack_natively = native.pack

    def pack(*arguments):
        count.append(1)
        pack_natively(*arguments)

    monkeypatch.setattr(native, "pack", pack)
    head, x = fitted(make, 1)
    same([head(x)], [plain(head, x)])
    count.clear()
    ids, out = torch.arange(len(x)), Decisions.empty(len(x), 30)
    for _ in range(3):
        head(x)
        head.score(x, RULE)
        head.step(x, 0.5, ids, out, rule=RULE, exit=0)
        head.decide(x, 0.5, ids, out, rule=RULE, exit=0)
    assert not count

    before = head(x)
    other, y = fitted(make, 2)
    head.load_state_dict(other.state_dict())
    same([head(y)], [other(y)])
    assert not torch.equal(head(x), before)
    fitted(make, 3, head=head)
    same([head(x)], [plain(head, x)])
    with torch.no_grad():
        (head.weight if isinstance(head, WhitenedMeans) else head.means).mul_(1.5)
    same([head(x)], [plain(head, x)])
    head.to(torch.device("cpu"), memory_format=torch.channels_last)
    same([head(x)], [plain(head, x)])
    same([copy.deepcopy(head)(x)], [head(x)])
    same([pickle.loads(pickle.dumps(head))(x)], [head(x)])
    with torch.inference_mode():
        same([head(x)], [plain(head, x)])


def test_a_head_of_inference_mode_is_not_packed_since_its_changes_cannot_be_seen():
    with torch.inference_mode():
        head = ClassMeans(30, (16,))
        x = torch.randn(5, 16)
        head.scale.fill_(1)
        head(x)
        head.means.copy_(torch.randn(30, 16))
        same([head(x)], [plain(head, x)])


@pytest.mark.slow
@pytest.mark.parametrize("make", [ClassMeans, WhitenedMeans])
def test_a_compiled_head_gives_the_same_answers(make):
    head, x = fitted(make, 1)
    head(x)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), head(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("classes", [5, 30])
@pytest.mark.parametrize("make", [ClassMeans, WhitenedMeans])
def test_a_head_in_torch_jit_trace(make, classes):
    """It sees operators alone: a call of the compiled module would leave it with memory that is never written."""
    head, x = fitted(make, 1, classes)
    traced = torch.jit.trace(head, x[:5])
    same([traced(x[5:9])], [head(x[5:9])])
