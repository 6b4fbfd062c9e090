"""`explain=true`: one map over HTTP, in the client and in `predict`; limits, failures and drift."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from typer.testing import CliRunner

from sopdeploy.client import Client
from sopdeploy.images.occlusion import IMAGES_PER_MAP
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_commands.app import app
from sopdeploy_service.http.api_keys import new_key
from tests.support.fake_runtime import FakeRuntime
from tests.support.raw import count
from tests.support.runtimes import Held
from tests.support.service import picture_bytes, wait_for

URL = "/v1/classify?explain=true"


def test_http_client_and_predict_return_the_same_map(
    serve_with, onnx_runtime, bundle_path, jpeg, tmp_path
) -> None:
    client = serve_with(onnx_runtime)
    reply = client.post(f"{URL}&top_k=2", content=jpeg)
    assert [len(row) for row in reply.json()["explanation"]] == [7] * 7
    assert "explain;dur=" in reply.headers["Server-Timing"]

    expected = pytest.approx(np.array(reply.json()["explanation"]), abs=1e-6)
    with Client(str(client.base_url)) as typed:
        assert np.array(typed.classify(jpeg, explain=True).explanation) == expected
        assert typed.classify(jpeg).explanation is None
    (tmp_path / "a.jpg").write_bytes(jpeg)
    command = ["predict", str(bundle_path), str(tmp_path / "a.jpg"), "--set", "explain=true"]
    (found,) = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)

    assert np.array(found["explanation"]) == expected
    row, column = np.unravel_index(np.argmax(found["explanation"]), (7, 7))
    text = CliRunner().invoke(app, command).stdout
    assert f"row {row + 1}, column {column + 1} of 7 x 7" in text


def test_of_several_images_each_has_its_own_map_or_error(serve_with, onnx_runtime) -> None:
    client = serve_with(onnx_runtime, max_images=200)
    pictures = [picture_bytes((200, 30, 60)), b"no picture", picture_bytes((30, 200, 60))]
    alone = [client.post(URL, content=picture).json() for picture in pictures]
    files = [("image", ("a.jpg", picture)) for picture in pictures]
    results = client.post(URL, files=files).json()["results"]

    assert results[1]["error"]["code"] == alone[1]["code"]
    for number in (0, 2):
        expected = np.array(alone[number]["explanation"])
        assert np.array(results[number]["explanation"]) == pytest.approx(expected, abs=1e-6)


def test_an_image_counts_as_fifty(serve_with, onnx_runtime, jpeg, tmp_path) -> None:
    small = serve_with(onnx_runtime, max_images=IMAGES_PER_MAP - 1).post(URL, content=jpeg)
    assert (small.status_code, small.json()["code"]) == (422, "too_many_explained")
    keys = tmp_path / "keys.toml"
    key = new_key(keys, "some", 0.001)
    headers = {"Authorization": f"Bearer {key}"}
    limited = serve_with(onnx_runtime, keys=keys)
    codes = [limited.post(URL, content=jpeg, headers=headers).status_code for _ in range(2)]

    assert codes == [200, 429]
    runtime = Held()
    client = serve_with(runtime, queue_size=99, max_images=50)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, URL, content=jpeg)
        assert runtime.entered.wait(60)
        assert count(client, "queue_depth") == IMAGES_PER_MAP
        full = client.post(URL, content=jpeg)
        runtime.gate.set()
        assert first.result().status_code == 200

    assert (full.status_code, full.json()["code"]) == (429, "queue_full")
    wait_for(lambda: count(client, "queue_depth") == 0)
    assert sum(runtime.batches) == IMAGES_PER_MAP


class FailsOnGray(FakeRuntime):
    """Its output for an image with a gray pixel is not finite."""

    def run(self, images):
        outputs = super().run(images)
        gray = (images == np.round(255 * np.array(Preprocess().mean))).all(axis=3)
        outputs["logits"][gray.any(axis=(1, 2))] = np.nan
        return outputs


def test_a_copy_that_fails_is_the_error_of_its_image(serve_with, jpeg) -> None:
    client = serve_with(FailsOnGray(num_classes=7))
    assert client.post("/v1/classify", content=jpeg).status_code == 200

    failed = client.post(URL, content=jpeg)
    assert (failed.status_code, failed.json()["code"]) == (500, "nonfinite_output")


def test_copies_do_not_count_as_predictions(serve_with, onnx_runtime, jpeg) -> None:
    client = serve_with(onnx_runtime)

    assert client.post(URL, content=jpeg).status_code == 200
    page = client.get("/metrics").text
    assert re.findall(r"^sopdeploy_confidence_count\{.*\} (.*)$", page, re.MULTILINE) == ["1.0"]
