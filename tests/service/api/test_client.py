"""The Python client and NVIDIA's Triton client against real servers."""

import base64
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from sopdeploy.bundle.http_api import name_classes
from sopdeploy.images.decode import decode
from tests.support.service import LABELS, picture_bytes

PAGE = Path(__file__).parents[3] / "docs" / "python.md"
THE_CLIENT = (
    PAGE.read_text(encoding="utf-8").partition("## The client\n")[2].partition("\n## ")[0]
)
*BLOCKS, IN_FASTAPI = re.findall(r"^```python\n(.*?)^```", THE_CLIENT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_examples_of_the_docs_run(block, client, jpeg, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").write_bytes(jpeg)
    names: dict[str, Any] = {}
    exec(block.replace("http://127.0.0.1:8000", str(client.base_url)), names)  # noqa: S102
    found = names.get("found", [])  # a block may only make a client
    results = found if isinstance(found, list) else [found]

    assert {result.classes[0].label for result in results} <= set(LABELS)


def test_the_program_of_the_docs_in_asyncio_runs(client, jpeg):
    names: dict[str, Any] = {}
    exec(IN_FASTAPI.replace("http://127.0.0.1:8000", str(client.base_url)), names)  # noqa: S102

    with TestClient(names["app"]) as program:
        found = program.post("/species", content=jpeg)
        refused = program.post("/species", content=b"no image")

    assert found.status_code == 200
    assert found.json() in LABELS
    assert refused.status_code == 415


with warnings.catch_warnings():  # warnings of its dependencies
    warnings.simplefilter("ignore")
    http = pytest.importorskip("tritonclient.http")

LIMITS = {"max_bytes": 10**6, "max_pixels": 10**6}


@pytest.fixture(scope="module")
def triton(client) -> Iterator[Any]:
    with http.InferenceServerClient(client.base_url.netloc.decode()) as found:
        yield found


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return [
        picture_bytes(),
        picture_bytes((10, 200, 30), kind="PNG"),
        picture_bytes((0, 0, 250), (90, 33)),
    ]


@pytest.fixture(scope="module")
def pixels(images, bundle):
    rules = bundle.manifest.preprocess
    return np.stack([decode(image, rules, **LIMITS).pixels for image in images])


@pytest.fixture(scope="module")
def classified(client, images):
    return [
        client.post("/v1/classify?top_k=7", content=image).json()["classes"] for image in images
    ]


def infer_input(name: str, values: np.ndarray, datatype: str, binary: bool) -> Any:
    tensor = http.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    return tensor


def equal(logits: np.ndarray, bundle: Any, classified: Any) -> bool:
    answers = [bundle.manifest.rules.answer(row) for row in logits]
    named = [name_classes(answer, bundle.labels, ())["classes"] for answer in answers]
    return named == list(classified)


@pytest.mark.parametrize(
    ("binary_in", "binary_out"), [(True, True), (False, False), (True, None)]
)
def test_tensors_get_the_predictions_of_v1(
    triton, pixels, classified, bundle, binary_in, binary_out
):
    outputs = (
        None
        if binary_out is None
        else [http.InferRequestedOutput("logits", binary_data=binary_out)]
    )

    for datatype, values in (("UINT8", pixels), ("FP32", pixels.astype(np.float32))):
        sent = [infer_input("images", values, datatype, binary_in)]
        found = triton.infer("tiny", sent, outputs=outputs, request_id="r1")
        logits = found.as_numpy("logits")
        assert logits.dtype == np.float32
        assert logits.shape == (3, 7)
        assert equal(logits, bundle, classified)
        about = {
            name: found.get_response()[name] for name in ("id", "model_name", "model_version")
        }
        assert about == {"id": "r1", "model_name": "tiny", "model_version": bundle.manifest.id}


def test_encoded_images_get_the_predictions_of_v1(triton, images, classified, bundle):
    texts = [base64.b64encode(image) for image in images]
    for shape, binary, sent in (((3,), True, images), ((3, 1), False, texts)):
        inputs = [
            infer_input("IMAGE", np.array(sent, dtype=object).reshape(shape), "BYTES", binary)
        ]
        found = triton.infer("tiny", inputs, model_version=bundle.manifest.id)
        assert equal(found.as_numpy("logits"), bundle, classified)


def test_server_and_model_metadata(triton, bundle):
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("tiny")
    assert triton.is_model_ready("tiny", bundle.manifest.id)
    assert not triton.is_model_ready("other")
    assert not triton.is_model_ready("tiny", "1")
    assert triton.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert triton.get_model_metadata("tiny", bundle.manifest.id) == {
        "name": "tiny",
        "versions": [bundle.manifest.id],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3]},
            {"name": "IMAGE", "datatype": "BYTES", "shape": [-1, 1]},
        ],
        "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 7]}],
    }
