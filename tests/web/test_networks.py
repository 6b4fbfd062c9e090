"""Networks at full size replay in Chromium; one of the catalog: `tests/export/test_browser.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import sopdeploy
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.web.chromium import PageReport
from sopdeploy_export.web.site import fill_site
from tests.real.conftest import LITE0, PHOTOS, lite0_file  # noqa: F401 - a fixture

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.usefixtures("linked_runtime")]
Replay = Callable[[Path], PageReport]


def check(exported: Path, folder: Path, replay: Replay) -> None:
    (folder / "site").mkdir()
    steps = fill_site(open_bundle(exported), folder / "site")
    report = replay(folder / "site")
    assert (report.failure, report.steps) == ("", steps)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_heads_on_lite0_replay(
    precision: str,
    tmp_path: Path,
    replay: Replay,
    lite0_file: Path,  # noqa: F811 - the fixture
) -> None:
    settings: dict[str, Any] = {"model.name": LITE0, "procedure.kind": "few_shot", "procedure.heads": ["gap"]}
    run = sopdeploy.train(PHOTOS, out=tmp_path / "run", weights=lite0_file, **settings)
    more = {"calibrate": PHOTOS, "max_drop": 4} if precision == "int8" else {}
    exported = sopdeploy.export(run.best, tmp_path / "bundles", precision=precision, **more)
    check(exported.path, tmp_path, replay)


def test_a_vision_transformer_replays(tmp_path: Path, replay: Replay) -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_classes=4).eval()
    rules = Preprocess(resize=248, crop=224, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    more: dict[str, Any] = {
        "labels": tuple("abcd"),
        "preprocess": rules,
        "name": "vit",
        "destination": tmp_path,
    }
    check(sopdeploy.export_network(network, **more).path, tmp_path, replay)
