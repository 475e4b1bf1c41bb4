"""A real server on this machine, over HTTP, under load: what is valid is answered as offline, the rest is refused."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.networks import SHAPE, samples
from support.packages import network, noisy
from support.tensors import NAN

sys.path.append(str(Path(__file__).parents[2]))  # at the end: e2cm_ext is the installed one
from bench import clients

pytestmark = [
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("litserve", "prometheus_client")),
        reason="needs litserve and prometheus-client: the extra `serve`",
    ),
    pytest.mark.serving,
    pytest.mark.subprocess,
]
CLIENTS, REQUESTS, EVERY = 16, 1000, 10


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    ee = network()
    ee.export(folder / "p.zip", "torch", progress=False)
    with clients.serving(folder / "p.zip", folder, threads=1, body_timeout=2.0, max_bytes=4096, timeout=300.0) as port:
        yield ee, port


def refused(port, image):
    """Requests that are not to be answered, and what is to be said to them."""
    good = clients.body_of(image)
    short, long = clients.body_of(image[..., 1:]), clients.body_of(np.repeat(image, 20))
    spoiled = image.copy()
    spoiled[0, 0, 0] = NAN
    bodies = [
        (b"", 422),
        (b"not JSON", 422),
        (good[:-20], 422),  # cut off, and the length is that of what is left
        (b'{"image": 3}', 422),
        (b'{"image": "&&&&"}', 422),
        (b'{"picture": "AAAA"}', 422),
        (json.dumps([1, 2]).encode(), 422),
        (short, 422),
        (clients.body_of(spoiled), 422),
        (long, 413),
    ]
    cases = [(lambda c, body=body: clients.post(port, body, c), status) for body, status in bodies]
    for hang_up, status in ((False, 408), (True, 0)):  # who hangs up is not there any more to be told

        def cut_off(connection, hang_up=hang_up):
            connection.close()  # a server closes one that nothing comes from for some seconds
            return clients.cut_off(port, good, hang_up)

        cases.append((cut_off, status))
    return cases


@pytest.mark.slow
def test_under_load_what_is_valid_is_answered_and_the_rest_refused(server):
    ee, port = server
    images = noisy(samples(REQUESTS, seed=3)).numpy()
    expected = ee.predict(torch.from_numpy(images))
    bad = refused(port, images[0])
    requests, wanted = [], []
    for i, image in enumerate(images):
        if i % EVERY == 5:
            request, status = bad[i // EVERY % len(bad)]
        else:
            request, status = (lambda c, image=image: clients.post(port, clients.body_of(image), c)), 200
        requests.append(request)
        wanted.append(status)
    replies, _ = clients.all_at_once(requests, port, CLIENTS)
    assert [status for status, _ in replies] == wanted
    assert set(wanted) == {200, 422, 413, 408, 0}
    names = (*ee.exit_names, "(end)")
    for i, (status, answer) in enumerate(replies):
        if status == 200:
            exit = int(expected.exit[i])
            assert (answer["prediction"], answer["exit"]) == (int(expected.prediction[i]), exit)
            assert answer["exit_name"] == names[exit]
            assert answer["confidence"] == pytest.approx(float(expected.confidence[i]), rel=1e-3)
        elif answer is not None:
            assert answer["detail"]

    # What has been going on is what has been counted.
    status, text = clients.get(port, "/metrics")
    metrics = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert status == 200
    for code in (200, 422, 413, 408):
        assert float(metrics[f'e2cm_requests_total{{status="{code}"}}']) == wanted.count(code)
    assert float(metrics['e2cm_requests_total{status="499"}']) == wanted.count(0)
    answered = [int(expected.exit[i]) for i, status in enumerate(wanted) if status == 200]
    for exit in set(answered):
        assert float(metrics[f'e2cm_exits_total{{exit="{exit}"}}']) == answered.count(exit)
    assert float(metrics["e2cm_batch_size_sum"]) == len(answered)
    assert float(metrics["e2cm_batch_size_count"]) < len(answered)  # some were run together
    assert float(metrics["e2cm_request_seconds_count"]) == REQUESTS
    assert clients.get(port, "/health") == (200, "ok")


def test_shape_and_dtype_of_images_can_be_given():
    from e2cm_ext.integrations.litserve import EarlyExitAPI

    api = EarlyExitAPI(network, SHAPE, dtype="uint8", prepare=lambda images: images.astype("float32") / 255)
    assert api.image_bytes == 64
    api.setup("cpu")
    image = (255 * np.random.default_rng(0).random(SHAPE)).astype("uint8")
    expected = network().predict(torch.from_numpy(image[None].astype("float32") / 255))
    (answer,) = api.predict([image])
    assert answer == api.predict(image)  # as LitServe wants it with max_batch_size=1
    assert (answer["prediction"], answer["exit"]) == (int(expected.prediction), int(expected.exit))


def test_a_function_needs_a_shape_beside_it():
    from e2cm_ext.integrations.litserve import serve

    with pytest.raises(TypeError, match="`shape` is None; a function does not tell"):
        serve(network)
