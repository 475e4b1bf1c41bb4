"""Data: what comes out of arrays, files, folders and torchvision, against numpy; what is refused, and how."""

import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import INF, NAN, generator, same_bits
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from e2cm_ext.data import Arrays, Batches, checked, load, split, transform_of
from e2cm_ext.data.arrays import PILImages

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
COLOUR = (MEAN, STD)


def pictures(count=20, *shape, classes=3, seed=0):
    """uint8 images and labels."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, *shape), dtype=np.uint8), random.integers(0, classes, count)


def by_numpy(images, normalise=None):
    """[N, H, W(, C)] uint8 -> [N, C, H, W] double, scaled and normalised."""
    x = images[..., None] if images.ndim == 3 else images
    x = x / 255
    if normalise is not None:
        x = (x - np.array(normalise[0])) / np.array(normalise[1])
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def all_of(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def assert_close(got, expected):
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.fixture
def colour_file(tmp_path):
    (x, y), (x_test, y_test) = pictures(20, 6, 5, 3), pictures(7, 6, 5, 3, seed=1)
    np.savez(tmp_path / "colour.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test, classes=["cat", "dog", "eel"])
    return tmp_path / "colour.npz"


# ---- arrays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 3), (6, 5, 4)])
@pytest.mark.parametrize("normalise", [None, (0.5, 0.25)])
@pytest.mark.parametrize("last", [False, True])
def test_batches_of_arrays_against_numpy(shape, normalise, last):
    x, y = pictures(20, *shape)
    loader = Batches(Arrays(x, y, normalise=normalise), batch_size=8, channels_last=last)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    assert len(loader) == 3
    assert len(loader.dataset) == 20
    for images, labels in batches:
        assert labels.dtype is torch.int64
        assert images.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    images, labels = all_of(loader)
    assert_close(images, by_numpy(x, normalise))
    assert labels.tolist() == y.tolist()


def test_normalisation_per_channel():
    x, y = pictures(5, 6, 5, 3)
    (images, _), *_ = Batches(Arrays(x, y, normalise=COLOUR))
    assert_close(images, by_numpy(x, COLOUR))
    assert_close(Arrays(x, y, normalise=COLOUR)[2][0], by_numpy(x, COLOUR)[2])


def test_the_bits_of_the_usual_steps():
    x, y = pictures(5, 6, 5, 3)
    (images, _), *_ = Batches(Arrays(x, y, normalise=COLOUR))
    usual = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    assert same_bits(images, (usual - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_float_images(dtype):
    x, y = pictures(5, 6, 5, 3)
    floats = (x / 255).astype(dtype)
    kept = floats.copy()
    arrays = Arrays(floats, y, normalise=COLOUR)
    images, _ = all_of(Batches(arrays))
    torch.testing.assert_close(images.double(), by_numpy(x, COLOUR), rtol=0, atol=1e-2 if dtype is np.float16 else 1e-6)
    arrays[0], Arrays(floats, y, normalise=COLOUR, size=4)[0]
    assert (floats == kept).all()  # normalised in place is only what has been copied
    grey = torch.from_numpy(floats[..., 0].astype(np.float32))
    Arrays(grey, y, normalise=(0.5, 0.5))[0]
    assert torch.equal(grey, torch.from_numpy(floats[..., 0].astype(np.float32)))


def test_arrays_of_all_sorts():
    x, y = pictures(5, 6, 5, 3)
    expected = by_numpy(x)
    x.flags.writeable = False
    for images in (x, torch.from_numpy(x.copy()), x[:, ::-1][:, ::-1], x[::-1].copy()[::-1]):
        for labels in (y, y.tolist(), torch.from_numpy(y), y.astype(np.uint8), y.astype(np.uint16), y.astype(">i4")):
            got_images, got_labels = all_of(Batches(Arrays(images, labels, normalise=None)))
            assert_close(got_images, expected)
            assert got_labels.tolist() == y.tolist()


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize(
    ("shape", "size"), [((40, 31), 16), ((31, 40), 16), ((38, 32), 16), ((20, 20), 33), ((12, 12), 12), ((9, 14), 9)]
)
def test_sizes_as_pil_makes_them(kind, shape, size):
    image = pytest.importorskip("PIL.Image")
    x, y = pictures(2, *shape, 3)
    images, _ = all_of(Batches(Arrays(x if kind is np.uint8 else (x / 255).astype(kind), y, normalise=None, size=size)))
    assert images.shape == (2, 3, size, size)
    height, width = shape
    scaled = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    left, top = round((scaled[0] - size) / 2), round((scaled[1] - size) / 2)
    for got, original in zip(images, x, strict=True):
        picture = image.fromarray(original).resize(scaled, image.Resampling.BILINEAR)
        expected = np.array(picture.crop((left, top, left + size, top + size)))
        assert (
            got - by_numpy(expected[None])[0]
        ).abs().max() < 1.01 / 255  # PIL rounds after each of the two directions


# ---- the order ---------------------------------------------------------------------------------------------------


def numbered(count):
    """Every image and its label tell which sample it is."""
    x = np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    return Arrays(x, np.arange(count), normalise=None)


def numbers(loader):
    images, labels = all_of(loader)
    assert (images[:, 0, 0, 0] * 255).round().long().tolist() == labels.tolist()
    return labels.tolist()


def test_the_order_is_the_same_every_time():
    loader = Batches(numbered(50), batch_size=7, shuffle=True, seed=3)
    first = numbers(loader)
    assert sorted(first) == list(range(50)) != first
    assert numbers(loader) == first
    assert numbers(Batches(numbered(50), batch_size=11, shuffle=True, seed=3)) == first
    assert numbers(Batches(numbered(50), shuffle=True, seed=4)) != first
    torch.manual_seed(0)
    before = torch.get_rng_state()
    numbers(Batches(numbered(50), shuffle=True))
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's random numbers are used up
    assert numbers(Batches(numbered(50))) == list(range(50))


def test_parts():
    arrays = numbered(50)
    assert numbers(Batches(arrays, part=slice(5))) == [0, 1, 2, 3, 4]
    assert numbers(Batches(arrays, part=slice(40, None, 3))) == [40, 43, 46, 49]
    assert numbers(Batches(arrays, part=[7, 3])) == [7, 3]
    assert numbers(Batches(arrays, part=torch.tensor([7, 3]))) == [7, 3]
    some = Batches(arrays, part=slice(10), shuffle=True)
    assert sorted(numbers(some)) == list(range(10))  # the part first, then the order
    assert numbers(some.part(slice(4))) == numbers(some)[:4]
    assert [int(label) for _, label in some.dataset] == numbers(some)
    with pytest.raises(ValueError, match=r"no samples: `part` is slice\(60, None, None\) of 50"):
        Batches(arrays, part=slice(60, None))


@given(
    count=st.integers(2, 80),
    shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
    seed=st.integers(0, 100),
    total=st.floats(0.3, 1),
)
def test_splits_share_no_sample(count, shares, seed, total):
    shares = [share * total / sum(shares) for share in shares]
    for loader in (Batches(numbered(count), batch_size=9), DataLoader(numbered(count), batch_size=9)):
        try:
            parts = split(loader, shares, seed)
        except ValueError:
            assert min(shares) * count < 1.5  # a part would be empty
            continue
        found = [numbers(part) for part in parts]
        assert len(found) == len(shares)
        assert all(abs(len(part) - share * count) <= 1 for part, share in zip(found, shares, strict=True))
        everything = [number for part in found for number in part]
        assert len(everything) == len(set(everything))
        assert abs(len(everything) - total * count) <= 0.5 + 1e-6
        assert all(part == sorted(part) for part in found)
        assert [numbers(part) for part in split(loader, shares, seed)] == found


def test_splits_by_number_and_by_seed():
    loader = Batches(numbered(50), batch_size=9, channels_last=True)
    first, second = split(loader, [30, 5])
    assert (len(first.dataset), len(second.dataset)) == (30, 5)
    assert first.batch_size == 9
    assert first.channels_last
    assert numbers(split(loader, [0.5])[0]) != numbers(split(loader, [0.5], seed=1)[0])
    assert [len(part.dataset) for part in split(loader, [0.8, 0.2])] == [40, 10]
    assert numbers(first) != list(range(30))  # drawn, not cut
    halves = split(first, [0.5, 0.5])
    assert sorted(numbers(halves[0]) + numbers(halves[1])) == numbers(first)
    shuffled = Batches(numbered(50), shuffle=True)
    part = numbers(split(shuffled, [0.5])[0])
    assert part == [n for n in numbers(shuffled) if n in part]


def test_a_split_data_loader_keeps_its_ways():
    pair = TensorDataset(torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10))
    loader = DataLoader(pair, batch_size=3, collate_fn=lambda samples: len(samples))
    assert list(split(loader, [0.7])[0]) == [3, 3, 1]


@pytest.mark.parametrize("shares", [[], [0.5, 0.6], [0.0, 1.0], [-0.1], [30, 21], [0.99, 0.001], [NAN]])
def test_shares_that_are_none(shares):
    with pytest.raises(ValueError, match=r"`lengths` are \[.*\] of 50 samples; wanted"):
        split(Batches(numbered(50)), shares)


def test_what_cannot_be_split():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    for loader in ([1, 2], numbered(5), DataLoader(numbered(5), batch_size=None)):
        with pytest.raises(TypeError, match=r"`loader` is a .*; wanted Batches, or a DataLoader with a batch_size"):
            split(loader, [0.5])
    with pytest.raises(TypeError, match="`dataset` is a Stream; wanted one with a length"):
        split(DataLoader(Stream()), [0.5])
    with pytest.raises(TypeError, match="`dataset` is a Stream; wanted one with a length"):
        Batches(Stream())


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, None])
def test_batch_sizes_that_are_none(batch_size):
    with pytest.raises(ValueError, match=f"`batch_size` is {batch_size}"):
        Batches(numbered(5), batch_size=batch_size)


# ---- arrays that are refused -------------------------------------------------------------------------------------

GOOD_X, GOOD_Y = pictures(4, 6, 5, 3)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (GOOD_X[:3], GOOD_Y, "`images` has 3 images, `labels` 4 labels"),
        (GOOD_X[:0], GOOD_Y[:0], r"`images` has shape \[0, 6, 5, 3\]"),
        (GOOD_X[:, :0], GOOD_Y, r"`images` has shape \[4, 0, 5, 3\]"),
        (GOOD_X[0, 0], GOOD_Y, r"`images` has shape \[5, 3\]; wanted \[N, H, W\] or \[N, H, W, C\]"),
        (GOOD_X.transpose(0, 3, 1, 2), GOOD_Y, r"`images` has shape \[4, 3, 6, 5\].*transpose\(0, 2, 3, 1\)"),
        (GOOD_X.astype(np.int64), GOOD_Y, "`images` are torch.int64; wanted uint8, or floats"),
        (GOOD_X.astype(np.float32), GOOD_Y, r"`images` are floats from \d+ to \d+; wanted \[0, 1\] \(divide by 255"),
        (np.full((4, 6, 5), -0.1), GOOD_Y, r"`images` are floats from -0.1 to -0.1; wanted \[0, 1\]"),
        (np.full((4, 6, 5), np.nan), GOOD_Y, "`images` are floats from nan to nan"),
        (GOOD_X.astype(str), GOOD_Y, "`images` are <U"),
        (GOOD_X, GOOD_Y.astype(np.float32), "`labels` are torch.float32; wanted whole numbers"),
        (GOOD_X, GOOD_Y == 1, "`labels` are torch.bool; wanted whole numbers"),
        (GOOD_X, np.eye(4), "`labels` are torch.float64"),
        (GOOD_X, np.eye(4, dtype=int), r"`labels` has shape \[4, 4\]; wanted \[N\].*argmax\(1\)"),
        (GOOD_X, GOOD_Y[:, None], r"`labels` has shape \[4, 1\]; wanted \[N\], one label per image$"),
        (GOOD_X, [0, 1, -1, 2], "`labels` go from -1 to 2; wanted 0 and more"),
        (GOOD_X, ["a", "b", "c", "d"], "`labels` are <U1; wanted whole numbers"),
    ],
)
def test_arrays_that_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        Arrays(x, y, normalise=None)


def test_more_labels_than_classes():
    with pytest.raises(ValueError, match=r"`labels` go from 0 to 2; wanted 0 to 1, as there are 2 `classes`"):
        Arrays(GOOD_X, [0, 1, 2, 1], normalise=None, classes=["a", "b"])
    assert Batches(Arrays(GOOD_X, [0, 1, 0, 1], normalise=None, classes=["a", "b"])).classes == ("a", "b")


@pytest.mark.parametrize(
    ("normalise", "message"),
    [
        ((0.5,), r"wanted \(mean, std\)"),
        (0.5, r"wanted \(mean, std\)"),
        (("a", "b"), r"wanted \(mean, std\)"),
        ((0.5, 0.0), "standard deviations above 0"),
        ((0.5, (0.1, -0.1, 0.1)), "standard deviations above 0"),
        ((NAN, 1.0), "divide by 255"),
        ((0.5, INF), "divide by 255"),
        (((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)), "divide by 255"),
        (((0.1, 0.2), (0.5, 0.5)), "has 2 means and 2 standard deviations; images have 3 channels"),
        ((0.5, (0.1,) * 4), "has 1 means and 4 standard deviations; images have 3 channels"),
    ],
)
def test_normalisations_that_are_none(normalise, message):
    with pytest.raises(ValueError, match="`normalise` .*" + message):
        Arrays(GOOD_X, GOOD_Y, normalise=normalise)


@pytest.mark.parametrize("size", [0, -3, 2.5, (4, 4)])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="`size` is "):
        Arrays(GOOD_X, GOOD_Y, normalise=None, size=size)


# ---- .npz --------------------------------------------------------------------------------------------------------


def test_npz(colour_file):
    for name, count, seed in (("train", 20, 0), ("test", 7, 1)):
        x, y = pictures(count, 6, 5, 3, seed=seed)
        loader = load(str(colour_file), split=name, normalise=COLOUR, batch_size=8)
        images, labels = all_of(loader)
        assert_close(images, by_numpy(x, COLOUR))
        assert labels.tolist() == y.tolist()
        assert loader.classes == ("cat", "dog", "eel")
    loader = load(colour_file, normalise=None, batch_size=6, part=slice(10), shuffle=True, channels_last=True, size=4)
    assert [len(labels) for _, labels in loader] == [6, 4]
    assert next(iter(loader))[0].is_contiguous(memory_format=torch.channels_last)
    assert next(iter(loader))[0].shape == (6, 3, 4, 4)
    assert sorted(all_of(loader)[1].tolist()) == sorted(pictures(20, 6, 5, 3)[1][:10].tolist())


def test_npz_without_names_of_classes(tmp_path):
    x, y = pictures(5, 6, 5)
    np.savez_compressed(tmp_path / "grey.npz", x_val=x, y_val=y)
    loader = load(tmp_path / "grey.npz", split="val", normalise=None)
    assert loader.classes is None
    assert_close(all_of(loader)[0], by_numpy(x))


def test_npz_of_differences(tmp_path):
    x, y = pictures(11, 6, 5, 3)
    planes = np.stack([x[..., 1], x[..., 0] - x[..., 1], x[..., 2] - x[..., 1]], axis=1)
    rows = np.concatenate([planes[..., :1], planes[..., 1:] - planes[..., :-1]], axis=3)
    both = np.concatenate([rows[:, :, :1], rows[:, :, 1:] - rows[:, :, :-1]], axis=2)
    np.savez(tmp_path / "packed.npz", x_train_d=both, y_train=y)
    images, labels = all_of(load(tmp_path / "packed.npz", normalise=None))
    assert_close(images, by_numpy(x))
    assert labels.tolist() == y.tolist()
    np.savez(tmp_path / "packed.npz", x_train_d=x, y_train=y)
    with pytest.raises(ValueError, match=r"differences are uint8 \[11, 6, 5, 3\]; wanted uint8 \[N, 3, H, W\]"):
        load(tmp_path / "packed.npz", normalise=None)


def test_npz_with_something_missing(tmp_path, colour_file):
    with pytest.raises(ValueError, match=r"has no x_val and no y_val; it holds x_train, y_train, .*: see `split`"):
        load(colour_file, split="val", normalise=None)
    np.savez(tmp_path / "some.npz", x_train=GOOD_X)
    with pytest.raises(ValueError, match=r"has no y_train; it holds x_train"):
        load(tmp_path / "some.npz", normalise=None)
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        load(tmp_path / "none.npz", normalise=None)


def test_npz_whose_arrays_are_refused_by_name(tmp_path):
    np.savez(tmp_path / "bad.npz", x_train=GOOD_X, y_train=GOOD_Y[:3], x_test=GOOD_X * 1.0, y_test=GOOD_Y)
    with pytest.raises(ValueError, match="`x_train` has 4 images, `y_train` 3 labels"):
        load(tmp_path / "bad.npz", normalise=None)
    with pytest.raises(ValueError, match="`x_test` are floats from"):
        load(tmp_path / "bad.npz", split="test", normalise=None)


@pytest.mark.parametrize("kept", [0, 1, 30, 0.3, 0.6, 0.99])
def test_npz_that_is_cut_off(colour_file, kept):
    whole = colour_file.read_bytes()
    colour_file.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(ValueError, match=r"colour\.npz cannot be read: it is truncated, damaged, or no \.npz"):
        load(colour_file, normalise=None)


@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_npz_with_a_wrong_byte_is_refused_or_read_right(tmp_path_factory, at, value):
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    np.savez_compressed(path, x_train=GOOD_X, y_train=GOOD_Y)
    whole = bytearray(path.read_bytes())
    whole[int(at * len(whole))] ^= value
    path.write_bytes(whole)
    try:
        images, labels = all_of(load(path, normalise=None))
    except ValueError:
        return
    assert_close(images, by_numpy(GOOD_X))
    assert labels.tolist() == GOOD_Y.tolist()


def test_npz_with_pickles_is_not_opened(tmp_path):
    np.savez(tmp_path / "evil.npz", x_train=np.array([{}], dtype=object), y_train=GOOD_Y)
    with pytest.raises(ValueError, match=r"cannot be read: .*no .npz of plain arrays"):
        load(tmp_path / "evil.npz", normalise=None)
    np.save(tmp_path / "x.npy", GOOD_X)
    (tmp_path / "x.npy").rename(tmp_path / "one.npz")
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "one.npz", normalise=None)


# ---- what is said about the preparation --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 4},
        {"normalise": None, "transform": lambda picture: picture},
        {"transform": lambda picture: picture, "size": 4},
    ],
)
def test_nothing_is_guessed_about_the_preparation(colour_file, options):
    with pytest.raises(ValueError, match=r"say how images are prepared: normalise=\(mean, std\).*transform_of"):
        load(colour_file, **options)


def test_a_transform_gets_pil_images(colour_file):
    image = pytest.importorskip("PIL.Image")
    seen = []

    def prepare(picture):
        assert isinstance(picture, image.Image)
        seen.append(picture.mode)
        return torch.from_numpy(np.array(picture)).float().movedim(-1, 0) * 2

    loader = load(colour_file, transform=prepare, batch_size=8, channels_last=True)
    images, labels = all_of(loader)
    x, y = pictures(20, 6, 5, 3)
    assert_close(images, by_numpy(x) * 510)
    assert labels.tolist() == y.tolist()
    assert labels.dtype is torch.int64
    assert set(seen) == {"RGB"}
    assert loader.classes == ("cat", "dog", "eel")
    assert next(iter(loader))[0].is_contiguous(memory_format=torch.channels_last)


def test_a_transform_needs_uint8(tmp_path):
    np.savez(tmp_path / "floats.npz", x_train=GOOD_X / 255, y_train=GOOD_Y)
    with pytest.raises(ValueError, match=r"the images are torch.float32; `transform` gets PIL images and needs uint8"):
        load(tmp_path / "floats.npz", transform=lambda picture: picture)


def test_transform_of_weights():
    class Weights:
        def transforms(self):
            return "the transform"

    assert transform_of(Weights()) == "the transform"
    for source in (nn.Linear(1, 1), "resnet50", None):
        with pytest.raises(ValueError, match=r"does not say how its images were prepared.*normalise=\(mean, std\)"):
            transform_of(source)


# ---- torchvision and timm ----------------------------------------------------------------------------------------


@pytest.fixture
def torchvision():
    from support.vision import torchvision

    return torchvision


@pytest.fixture
def folder(tmp_path):
    """Two splits of three classes: class folders in alphabetical order."""
    image = pytest.importorskip("PIL.Image")
    for name, count in (("train", 3), ("val", 2)):
        for k, label in enumerate(("ant", "bee", "cat")):
            (tmp_path / name / label).mkdir(parents=True)
            x, _ = pictures(count, 6, 5, 3, seed=10 * k + count)
            for i, pixels in enumerate(x):
                image.fromarray(pixels).save(tmp_path / name / label / f"{i}.png")
    return tmp_path


def test_folder(torchvision, folder):
    x = np.concatenate([pictures(3, 6, 5, 3, seed=10 * k + 3)[0] for k in range(3)])
    loader = load(folder, normalise=COLOUR, batch_size=4)
    assert (len(loader), len(loader.dataset), loader.classes) == (3, 9, ("ant", "bee", "cat"))
    images, labels = all_of(loader)
    assert_close(images, by_numpy(x, COLOUR))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert labels.dtype is torch.int64
    assert same_bits(all_of(load(folder / "train", split=None, normalise=COLOUR))[0], images)
    assert len(load(str(folder), split="val", normalise=None).dataset) == 6
    some = load(folder, normalise=COLOUR, part=[8, 0], size=4, channels_last=True)
    (images, labels), *_ = some
    assert labels.tolist() == [2, 0]
    assert images.shape == (2, 3, 4, 4)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert [len(part.dataset) for part in split(loader, [6, 3])] == [6, 3]


def test_the_same_image_from_a_folder_and_from_an_array(torchvision, folder):
    x = np.concatenate([pictures(3, 6, 5, 3, seed=10 * k + 3)[0] for k in range(3)])
    images, _ = all_of(load(folder, normalise=COLOUR, size=4))
    assert same_bits(images, all_of(Batches(Arrays(x, [0] * 9, normalise=COLOUR, size=4)))[0])
    usual = torchvision.transforms.Compose(
        [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(MEAN, STD)]
    )
    assert same_bits(all_of(load(folder, transform=usual))[0], all_of(load(folder, normalise=COLOUR))[0])


def test_folder_read_by_workers(torchvision, folder):
    expected = all_of(load(folder, normalise=COLOUR, batch_size=4))
    got = all_of(load(folder, normalise=COLOUR, batch_size=4, workers=1))
    assert same_bits(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_folders_that_are_refused(torchvision, folder):
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match=r"has no folder 'test'; it has train, val\. split=None reads it whole"):
        load(folder, split="test", normalise=None)
    image.fromarray(GOOD_X[0, :4]).save(folder / "train" / "ant" / "small.png")
    with pytest.raises(ValueError, match=r"images of different sizes, \(3, 4, 5\) and \(3, 6, 5\): give `size`"):
        list(load(folder, normalise=None))
    assert all_of(load(folder, normalise=None, size=4))[0].shape == (10, 3, 4, 4)
    (folder / "val" / "ape").mkdir()
    with pytest.raises(ValueError, match=r"different classes, as \['ape'\]: their labels would not mean the same"):
        load(folder, normalise=None)
    with pytest.raises(FileNotFoundError, match=r"is neither a folder nor a .npz file, nor the name of a data set"):
        load(folder / "nowhere", normalise=None)


def test_a_folder_that_is_not_there_is_said_to_be_missing_whatever_torchvision_does(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"'nowhere' is neither a folder nor a .npz file, .* this needs torchvision"):
        load("nowhere", normalise=None)


def write_mnist(root, x, y, stem, name="MNIST"):
    raw = root / name / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    (raw / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, *x.shape) + x.tobytes())
    (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(y)) + y.astype(np.uint8).tobytes())


@pytest.mark.parametrize("name", ["MNIST", "mnist", "FashionMNIST", "kmnist"])
def test_torchvision_data_set_by_name(torchvision, tmp_path, monkeypatch, name):
    folder = {"mnist": "MNIST", "fashionmnist": "FashionMNIST", "kmnist": "KMNIST"}[name.lower()]
    (x, y), (x_test, y_test) = pictures(12, 28, 28, classes=10), pictures(5, 28, 28, classes=10, seed=1)
    write_mnist(tmp_path, x, y, "train", folder)
    write_mnist(tmp_path, x_test, y_test, "t10k", folder)
    loader = load(name, root=tmp_path, normalise=(0.13, 0.31), batch_size=5)
    assert isinstance(loader._source, Arrays)  # cut in one piece, not read image by image
    images, labels = all_of(loader)
    assert_close(images, by_numpy(x, (0.13, 0.31)))
    assert labels.tolist() == y.tolist()
    assert len(loader.classes) == 10
    assert all_of(load(name, split="test", root=tmp_path, normalise=None))[1].tolist() == y_test.tolist()
    by_transform = load(name, root=tmp_path, transform=torchvision.transforms.ToTensor())
    assert_close(all_of(by_transform)[0], by_numpy(x))
    # A folder of that name does not stand in the way, unless it is asked for as a path.
    monkeypatch.chdir(tmp_path)
    assert len(load(folder, root=".", normalise=None).dataset) == 12
    with pytest.raises(ValueError, match="has no folder 'train'"):
        load(f"./{folder}", normalise=None)
    with pytest.raises(ValueError, match=r"`split` is 'val'; .* has 'train' and 'test'"):
        load(name, split="val", root=tmp_path, normalise=None)


def test_torchvision_arrays_of_other_forms(torchvision, tmp_path, monkeypatch):
    x, y = pictures(12, 6, 5, 3)

    class Fake:
        classes = ("cat", "dog", "eel")

        def __init__(self, root, split="train", transform=None, download=False):
            self.data, self.labels = x.transpose(0, 3, 1, 2), y
            asked.append((root, split, download))

    class FakeCifar:
        classes = ("cat", "dog", "eel")

        def __init__(self, root, train=True, transform=None, download=False):
            self.data, self.targets = x, y.tolist()
            asked.append((root, train, download))

    asked = []
    monkeypatch.setattr(torchvision.datasets, "SVHN", Fake)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", FakeCifar)
    for name, option in (("svhn", "test"), ("cifar100", False)):
        images, labels = all_of(load(name, split="test", root=tmp_path, normalise=COLOUR))
        assert_close(images, by_numpy(x, COLOUR))
        assert labels.tolist() == y.tolist()
        load(name, split="test", root=tmp_path, normalise=COLOUR, download=True)
        assert asked == [(tmp_path, option, False), (tmp_path, option, True)]
        asked.clear()


def test_torchvision_data_set_read_image_by_image(torchvision, tmp_path):
    image = pytest.importorskip("PIL.Image")
    x, _ = pictures(4, 6, 5, 3)
    for i, pixels in enumerate(x):
        folder = tmp_path / "eurosat" / "2750" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(folder / f"{i}.png")
    images, labels = all_of(load("EuroSAT", split=None, root=tmp_path, normalise=COLOUR))
    assert_close(images, by_numpy(x[[0, 2, 1, 3]], COLOUR))
    assert labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="`split` is 'test'; EuroSAT is not split"):
        load("EuroSAT", split="test", root=tmp_path, normalise=None)


def test_nothing_is_downloaded_unasked(torchvision, tmp_path):
    for name in ("CIFAR10", "MNIST", "SVHN", "Semeion"):
        with pytest.raises(RuntimeError, match="download=True"):
            load(name, root=tmp_path, normalise=None)
    assert not list(tmp_path.glob("**/*.*"))


def test_transform_of_real_models(torchvision):
    from support.vision import timm

    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    x, y = pictures(2, 300, 260, 3)
    prepare = transform_of(weights)
    loader = Batches(PILImages(Arrays(x, y, normalise=None), prepare))
    assert all_of(loader)[0].shape == (2, 3, 224, 224)
    model = timm.create_model("resnet10t", pretrained=False)
    images, _ = all_of(Batches(PILImages(Arrays(x, y, normalise=None), transform_of(model))))
    assert images.shape == (2, *model.pretrained_cfg["input_size"])


def test_without_torchvision_the_way_out_is_named(tmp_path):
    """In a process of its own, where importing torchvision fails; arrays work there."""
    np.savez(tmp_path / "x.npz", x_train=GOOD_X, y_train=GOOD_Y)
    (tmp_path / "folder" / "train").mkdir(parents=True)
    code = f"""
import sys
sys.modules["torchvision"] = sys.modules["timm"] = sys.modules["PIL"] = None
from e2cm_ext.data import load
assert len(load({str(tmp_path / "x.npz")!r}, normalise=None).dataset) == 4
for source in ("MNIST", {str(tmp_path / "folder")!r}):
    try:
        load(source, normalise=None)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert len(re.findall(r"needs torchvision: pip install 'e2cm_ext\[vision\]'", done.stdout)) == 2


# ---- any loader --------------------------------------------------------------------------------------------------


def good_batches(count=3):
    g = generator(0)
    return [(torch.rand(4, 3, 6, 5, generator=g), torch.randint(5, (4,), generator=g)) for _ in range(count)]


def with_batch(images=None, labels=None):
    """Two good batches, and then one whose images or labels are these."""
    *good, (x, y) = good_batches()
    return [*good, (x if images is None else images, y if labels is None else labels)]


def run(loader, **options):
    return list(checked(loader, **({"num_classes": 5, "image_shape": (3, 6, 5)} | options)))


def test_good_batches_pass():
    expected = good_batches()
    for loader in (expected, iter(expected), (list(pair) for pair in expected)):
        got = run(loader)
        assert len(got) == 3
        for (images, labels), (x, y) in zip(got, expected, strict=True):
            assert images.data_ptr() == x.data_ptr()
            assert labels.data_ptr() == y.data_ptr()
    for images, labels in run(expected, device="meta", finite=False):
        assert images.device.type == labels.device.type == "meta"
    assert len(list(checked(expected))) == 3


def test_batches_come_one_by_one():
    def endless():
        while True:
            yield from good_batches()

    for number, _ in enumerate(checked(endless())):
        if number == 100:
            break


@pytest.mark.parametrize(
    "form", [torch.int32, torch.int16, torch.uint8, "list", "numpy", "numpy int32", "lists of images too"]
)
def test_labels_of_all_sorts(form):
    expected = good_batches(1)[0][1]
    images = good_batches(1)[0][0]
    labels = expected.to(form) if isinstance(form, torch.dtype) else expected.tolist()
    if "numpy" in str(form):
        labels = np.array(labels, dtype=np.int32 if "32" in form else np.int64)
    if "images" in str(form):
        images = images.numpy()
    ((got_images, got),) = run([(images, labels)])
    assert got.dtype is torch.int64
    assert torch.equal(got, expected)
    assert got_images.shape == (4, 3, 6, 5)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 1, 5, 9]), ValueError, "batch 2 has a label 5; wanted 0 to 4, as there are 5 classes"),
        (torch.tensor([0, -1, 5, 9]), ValueError, "batch 2 has a label -1; wanted 0 to 4"),
        (torch.tensor([0.0, 1.0, 2.0, 3.0]), TypeError, r"labels in batch 2 are torch.float32.*call .long\(\)"),
        (torch.tensor([True, False, True, True]), TypeError, "labels in batch 2 are torch.bool"),
        (torch.eye(5)[:4], ValueError, r"labels in batch 2 have shape \[4, 5\]; wanted \[4\].*labels.argmax\(1\)"),
        (torch.eye(5, dtype=torch.int64)[:4], ValueError, r"have shape \[4, 5\].*labels.argmax\(1\)"),
        (torch.tensor([[0], [1], [2], [3]]), ValueError, r"have shape \[4, 1\]; wanted \[4\], one per image"),
        (torch.tensor([0, 1, 2]), ValueError, r"have shape \[3\]; wanted \[4\], one per image"),
        (torch.tensor(3), ValueError, r"have shape \[\]; wanted \[4\], one per image"),
        (3, ValueError, r"have shape \[\]; wanted \[4\], one per image"),
        (["cat"] * 4, TypeError, "labels in batch 2 are a list; wanted an int64 tensor"),
        ({"a": 1}, TypeError, "labels in batch 2 are a dict"),
        ([None] * 4, TypeError, "labels in batch 2 are a list"),
    ],
)
def test_labels_that_are_refused(labels, error, message):
    with pytest.raises(error, match=message):
        run(with_batch(labels=labels))
    assert len(run(with_batch(labels=labels), labels=False)) == 3


def test_labels_of_an_unknown_number_of_classes():
    assert len(list(checked(with_batch(labels=torch.tensor([0, 1, 2, 10**9]))))) == 3
    with pytest.raises(ValueError, match="batch 2 has a label -7; wanted 0 and more"):
        list(checked(with_batch(labels=torch.tensor([0, 1, 2, -7]))))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(4, 3, 6, 6), ValueError, r"images in batch 2 have shape \[4, 3, 6, 6\]; wanted \[B, 3, 6, 5\], as"),
        (torch.rand(3, 6, 5), ValueError, r"shape \[3, 6, 5\]; wanted \[B, 3, 6, 5\].*one image without a batch"),
        (torch.rand(4, 6, 5, 3), ValueError, r"shape \[4, 6, 5, 3\]"),
        (torch.zeros(4, 3, 6, 5, dtype=torch.uint8), TypeError, "images in batch 2 are torch.uint8; wanted floats"),
        ([[1.0]], TypeError, "images in batch 2 are a list; wanted a tensor"),
        ("a.png", TypeError, "images in batch 2 are a str; wanted a tensor"),
    ],
)
def test_images_that_are_refused(images, error, message):
    for labels in (True, False):
        with pytest.raises(error, match=message):
            run(with_batch(images=images), labels=labels)


def test_images_alone_may_be_of_numpy():
    (images, labels), *_ = checked([np.ones((4, 3, 6, 5), np.float32)], labels=False)
    assert images.shape == (4, 3, 6, 5) and labels is None
    with pytest.raises(TypeError, match=r"is a dict with 'image'; wanted images or \(images, labels\)"):
        list(checked([{"image": 1}], labels=False))


@pytest.mark.parametrize("loader", [None, 3])
def test_no_loader(loader):
    with pytest.raises(TypeError, match=f"`loader` is a {type(loader).__name__}; wanted something that gives"):
        list(checked(loader))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_images_that_are_not_finite(bad, dtype):
    images = torch.rand(4, 3, 6, 5).to(dtype)
    images[3, 2, 5, 4] = bad
    with pytest.raises(ValueError, match="image 3 in batch 2 holds NaN or infinity"):
        run(with_batch(images=images))
    assert len(run(with_batch(images=images), finite=False)) == 3


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.rand(4, 3, 6, 5), r"batch 0 of the loader is a Tensor without labels; wanted \(images, labels\)"),
        ([torch.rand(4, 3, 6, 5)], "is a list of 1; wanted"),
        ((torch.rand(4, 3, 6, 5), torch.zeros(4), "a.png"), "is a tuple of 3; wanted"),
        ({"image": 1, "label": 2}, "is a dict with 'image', 'label'; wanted"),
        (None, "is a NoneType; wanted"),
    ],
)
def test_loaders_without_labels(item, message):
    with pytest.raises(TypeError, match=message):
        run([item])


def test_a_batch_in_place_of_a_loader():
    with pytest.raises(TypeError, match=r"a Tensor without labels; wanted.*a single batch is \[\(images, labels\)\]"):
        run(good_batches(1)[0])


def test_images_alone_where_no_labels_are_wanted():
    images = torch.rand(4, 3, 6, 5)
    for item in (images, [images], (images, None), (images, ["what", "ever"])):
        ((got, labels),) = run([item], labels=False)
        assert got.data_ptr() == images.data_ptr()
        assert labels is None


def test_loaders_that_give_nothing():
    with pytest.raises(ValueError, match=r"the loader gave no batch: it is empty$"):
        run([])
    used = iter(good_batches())
    run(used)
    with pytest.raises(
        ValueError, match="the loader gave no batch: it is an iterator, which can be run through only once"
    ):
        run(used)
    empty = (torch.rand(0, 3, 6, 5), torch.zeros(0, dtype=torch.int64))
    assert len(run([empty, *good_batches()])) == 3
    assert run([empty]) == []
