"""Bulk inference on a local Ray: every image is answered once, also if a worker is killed in the middle."""

import importlib.util
import os

import numpy as np
import pytest
import torch
from support.networks import SHAPE, net, samples
from support.packages import network, noisy
from support.subprocesses import environment

if not importlib.util.find_spec("ray"):
    pytest.skip("needs ray: the extra `ray`", allow_module_level=True)

import ray
from support import ray_workers

from e2cm_ext.integrations.ray import Predictor

pytestmark = [pytest.mark.serving, pytest.mark.subprocess]

IMAGES, BATCH = 600, 20


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "p.zip"
    network().export(path, "torch", progress=False)
    return path


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory):
    # Workers start where the driver is: not in a checkout, which they would import.
    here = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("driver"))
    # Workers inherit them: they must find tests/support.
    mine = environment(RAY_USAGE_STATS_ENABLED="0")
    before = {name: os.environ.get(name) for name in mine}
    os.environ.update(mine)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=100 << 20,
        _node_ip_address="127.0.0.1",
    )
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()
    os.chdir(here)


def rows_of(answers):
    batches = list(answers.iter_batches(batch_size=None))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.slow
def test_every_image_is_answered_once_though_a_worker_is_killed(package, local_ray, tmp_path):
    images = noisy(samples(IMAGES, seed=3)).numpy()
    expected = network().predict(torch.from_numpy(images))
    found = ray.data.from_items(
        [{"id": i, "image": image} for i, image in enumerate(images)], override_num_blocks=10
    ).map_batches(
        ray_workers.Killed,
        fn_constructor_kwargs={"network": str(package), "at": IMAGES // 2, "marks": str(tmp_path), "log_probs": True},
        batch_size=BATCH,
        concurrency=2,
        num_cpus=1,
    )
    rows = rows_of(found)
    assert (tmp_path / "killed").exists()
    assert len(list(tmp_path.iterdir())) >= 1 + 3  # two workers, and the one that took over
    assert sorted(rows["id"].tolist()) == list(range(IMAGES))
    assert rows.keys() == {"id", "prediction", "confidence", "exit", "log_probs"}
    np.testing.assert_array_equal(rows["prediction"], expected.prediction[rows["id"]].numpy())
    np.testing.assert_array_equal(rows["exit"], expected.exit[rows["id"]].numpy())
    np.testing.assert_allclose(rows["log_probs"], expected.log_probs[rows["id"]].numpy(), rtol=1e-3, atol=1e-3)


def test_a_worker_may_make_its_network_itself_and_prepare_images():
    """Outside of Ray: it is a class like any other."""
    predictor = Predictor(network, column="pixels", prepare=lambda images: images.astype("float32") / 255, threads=1)
    pixels = (255 * np.random.default_rng(0).random((9, *SHAPE))).astype("uint8")
    expected = network().predict(torch.from_numpy(pixels.astype("float32") / 255))
    found = predictor({"name": np.arange(9), "pixels": pixels})
    assert found.keys() == {"name", "prediction", "confidence", "exit"}
    np.testing.assert_array_equal(found["prediction"], expected.prediction.numpy())
    one_by_one = np.empty(9, dtype=object)
    one_by_one[:] = list(pixels)
    np.testing.assert_array_equal(predictor({"pixels": one_by_one})["exit"], expected.exit.numpy())
    with pytest.raises(ValueError, match="`column` is 'pixels'; the dataset has 'image'"):
        predictor({"image": pixels})


def test_what_makes_no_network_is_said():
    with pytest.raises(TypeError, match="`network` has made a Net; wanted an EarlyExit"):
        Predictor(net, threads=1)
