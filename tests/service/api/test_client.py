"""The Python client against real servers."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sopdeploy.client import Client
from sopdeploy.errors import OverloadedError, ServiceError
from sopdeploy_service.commands.predict import predict_files
from sopdeploy_service.settings import Settings
from tests.service.conftest import LABELS
from tests.service.held import Held
from tests.service.raw import count


@pytest.fixture
def sdk(client):
    with Client(str(client.base_url)) as sdk:
        yield sdk


def test_classify_equals_predict_and_reports_the_model(sdk, bundle_path, jpeg, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg)
    found = sdk.classify(tmp_path / "a.jpg", top_k=7)
    expected = predict_files(bundle_path, [tmp_path / "a.jpg"], Settings(threads=1, top_k=7))[0]
    assert [c.label for c in found.classes] == [c.label for c in expected.classes]
    assert [c.probability for c in found.classes] == pytest.approx([c.probability for c in expected.classes])
    assert found.model_digest == sdk.info().models[0].id
    assert {"decode", "queue", "infer"} <= found.timing_ms.keys()


def test_every_kind_of_input_gives_the_same_classes(sdk, tmp_path):
    sdk.wait_ready(timeout=60)
    assert "sopdeploy_decoders" in sdk.metrics()
    pixels = np.random.default_rng(3).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    body = (tmp_path / "a.png").read_bytes()
    inputs = [tmp_path / "a.png", str(tmp_path / "a.png"), body, Image.fromarray(pixels), pixels]
    alone = [sdk.classify(value).classes for value in inputs]
    together = [found.classes for found in sdk.classify(inputs)]
    assert all(classes == alone[0] for classes in alone)
    for classes in together:
        assert [c.probability for c in classes] == pytest.approx([c.probability for c in alone[0]])


def test_a_bad_image_raises_alone_and_is_a_result_among_others(sdk, jpeg):
    with pytest.raises(ServiceError) as caught:
        sdk.classify(b"no image")
    assert (caught.value.status, caught.value.code) == (415, "not_an_image")
    good, bad = sdk.classify([jpeg, jpeg[:300]])
    assert good.error is None
    assert bad.error.code == "truncated_image"


def test_a_full_queue_is_retried(serve_with, jpeg, until):
    runtime = Held()
    server = serve_with(runtime, queue_size=1, max_images=1)
    url = str(server.base_url)
    with ThreadPoolExecutor(2) as pool, Client(url, retries=0) as once, Client(url, timeout=60) as patient:
        held = pool.submit(once.classify, jpeg)
        until(lambda: count(server, "queue_depth") == 1)
        with pytest.raises(OverloadedError) as rejected:
            once.classify(jpeg)
        assert rejected.value.code == "queue_full"
        retried = pool.submit(patient.classify, jpeg)
        until(lambda: count(server, 'rejected_total{reason="queue_full"}') >= 2)
        runtime.gate.set()
        assert held.result().classes == retried.result().classes


PAGE = Path(__file__).parents[3] / "docs" / "client.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_examples_of_the_docs_run(block, client, jpeg, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").write_bytes(jpeg)
    names: dict[str, Any] = {}
    exec(block.replace("http://127.0.0.1:8000", str(client.base_url)), names)  # noqa: S102
    results = names["found"] if isinstance(names["found"], list) else [names["found"]]
    assert {result.classes[0].label for result in results} <= set(LABELS)
