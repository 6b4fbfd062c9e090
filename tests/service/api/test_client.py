"""The Python client against real servers."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sopdeploy.client import Client
from sopdeploy.errors import ServiceError
from tests.service.conftest import LABELS


@pytest.fixture
def sdk(client):
    with Client(str(client.base_url)) as sdk:
        yield sdk


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
