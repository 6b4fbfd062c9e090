"""The class activation map over the image, in a real browser."""

from dataclasses import replace

import numpy as np
import pytest
from fake_runtime import FakeRuntime

from sopdeploy.bundle.class_maps import FILE, ClassMapLayer, write_class_maps
from sopdeploy.bundle.manifest import FEATURES, TensorRecord
from sopdeploy_service.settings import Settings
from tests.service.api.pages.conftest import give
from tests.service.conftest import picture_bytes, running

pytestmark = pytest.mark.browser

CANVAS = """canvas => ({
  hidden: canvas.hidden, size: [canvas.width, canvas.height], label: canvas.getAttribute("aria-label"),
  place: ["left", "top", "width", "height"].map((side) => Math.round(parseFloat(canvas.style[side]))),
  alphas: [...canvas.getContext("2d").getImageData(0, 0, 2, 2).data].filter((_, i) => i % 4 === 3),
})"""


class MapsRuntime(FakeRuntime):
    """Logits of `FakeRuntime`, and a feature map whose lower right cell is the largest."""

    def run(self, images):
        features = np.tile(np.array([[0, -1], [1, 4]], np.float32), (len(images), 1, 1, 1))
        return {**super().run(images), FEATURES: features}


@pytest.fixture
def maps_client(bundle, tmp_path):
    (tmp_path / "certificate.json").write_bytes(b"{}")
    write_class_maps(tmp_path / FILE, ClassMapLayer(np.ones((7, 1), np.float32), np.zeros(7, np.float32)))
    manifest, output = bundle.manifest, TensorRecord(name=FEATURES, dtype="float32", shape=(None, 1, 2, 2))
    files = {**manifest.files, FILE: manifest.files["labels.json"]}
    changed = manifest.model_copy(update={"outputs": (*manifest.outputs, output), "files": files})
    with running(
        MapsRuntime(num_classes=7), replace(bundle, path=tmp_path, manifest=changed), Settings()
    ) as client:
        yield client


def test_the_page_draws_the_map_over_its_part_of_the_image_until_it_is_switched_off(open_page, maps_client):
    page = open_page(maps_client.base_url)
    give(page, picture_bytes(size=(360, 180)))
    canvas = page.locator("#map")
    found = canvas.evaluate(CANVAS)
    label = page.locator("#classes .label").first.text_content()
    assert found == {
        "hidden": False,
        "size": [2, 2],
        "label": f"Class activation map of {label}",
        "place": [28, 6, 44, 89],
        "alphas": [0, 0, 64, 255],
    }
    assert "explain=true" in page.locator("#code-curl").text_content()
    page.locator("#explain").uncheck()
    page.wait_for_selector("#map", state="hidden")
    assert "explain" not in page.locator("#code-curl").text_content()


def test_the_page_of_a_bundle_without_maps_offers_none(page, jpeg):
    give(page, jpeg)
    assert page.locator("#explain-row").is_hidden()
    assert page.locator("#map").is_hidden()
