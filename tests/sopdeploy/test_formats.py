"""Files that sopdeploy 0.1.0 has written are read by every later version.

`pytest --rewrite-goldens tests/sopdeploy/test_formats.py` writes them; after the release of 0.1.0 only new
folders, for new versions of a format, are added.
"""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.checkpoint import Checkpoint, build_classifier, load_plain, read_checkpoint, write_checkpoint
from sopdeploy.errors import CheckpointError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.kept import KeptRecord, read_kept
from sopdeploy.models.registry import create_model
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings
from tests import quick_torch
from tests.service.conftest import picture_bytes, write_bundle
from tests.sopdeploy.test_kept import NAME, record_of

FOLDER = Path(__file__).parents[1] / "formats" / "0.1.0"
TIME = "2026-01-02T03:04:05.000000Z"


@pytest.fixture(scope="module", autouse=True)
def _written(pytestconfig: pytest.Config) -> None:
    """Write the files if this is asked for."""
    if not pytestconfig.getoption("--rewrite-goldens"):
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    write_bundle(FOLDER / "exported", exported_at=TIME)
    (FOLDER / "exported" / "latest").unlink()
    torch.manual_seed(0)
    network = create_model("resnet8", num_classes=2, base_width=2)
    checkpoint = Checkpoint(
        model="resnet8",
        config={"base_width": 2},
        weights=network.state_dict(),
        labels=("cat", "dog"),
        preprocess=Preprocess(resize=18, crop=16),
        training={"versions": {"sopdeploy": "0.1.0"}},
    )
    write_checkpoint(FOLDER / "ckpt.pt", checkpoint)
    (FOLDER / "kept").mkdir()
    (FOLDER / "kept" / f"{NAME}.jpg").write_bytes(picture_bytes())
    record = record_of(time=datetime(2026, 1, 2, tzinfo=UTC))
    (FOLDER / "kept" / f"{NAME}.json").write_text(record.model_dump_json() + "\n")


def test_a_bundle_is_read_and_keeps_its_id() -> None:
    (path,) = (FOLDER / "exported").glob("tiny-*")
    assert open_bundle(path).name == path.name
    assert load_model(path, Settings(threads=1)).bundle.manifest.exported_at == TIME


def test_a_checkpoint_is_read() -> None:
    with quick_torch.one_thread():
        checkpoint = read_checkpoint(FOLDER / "ckpt.pt")
        assert build_classifier(checkpoint, FOLDER)(torch.zeros(1, 3, 16, 16)).shape == (1, 2)


def test_kept_photographs_are_read() -> None:
    ((path, record),) = read_kept(FOLDER / "kept")
    assert (path.name, record.image) == (f"{NAME}.jpg",) * 2


def test_a_later_version_may_add_optional_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    class LaterManifest(Manifest):
        license: str = "unknown"

    (path,) = (FOLDER / "exported").glob("tiny-*")
    raw = (path / "manifest.json").read_bytes()
    later = LaterManifest.from_bytes(raw)
    assert (later.license, later.id, later.to_bytes()) == ("unknown", Manifest.from_bytes(raw).id, raw)

    class LaterRecord(KeptRecord):
        camera: str = ""

    assert LaterRecord.model_validate_json((FOLDER / "kept" / f"{NAME}.json").read_bytes()).camera == ""


LATER: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a version": (
        lambda fields: fields.update(version=2),
        "version: 2, .* reads 1; read it with sopdeploy 9.8",
    ),
    "a field": (lambda fields: fields.update(camera=1), "camera: unknown here; read it with sopdeploy 9.8"),
}


@pytest.mark.parametrize("case", LATER)
def test_a_checkpoint_of_a_later_version_names_who_reads_it(case: str, tmp_path: Path) -> None:
    change, message = LATER[case]
    path = FOLDER / "ckpt.pt"
    fields = load_plain(path, path.read_bytes())
    fields["training"] = {"versions": {"sopdeploy": "9.8"}}
    change(fields)
    torch.save(fields, tmp_path / "later.pt")
    with pytest.raises(CheckpointError, match=rf"later\.pt: {message}"):
        read_checkpoint(tmp_path / "later.pt")


def test_a_kept_record_of_a_later_version_is_skipped_and_stays(tmp_path: Path) -> None:
    kept = Path(shutil.copytree(FOLDER / "kept", tmp_path / "kept"))
    file = kept / f"{NAME}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))
    assert read_kept(kept) == []
    assert {path.name for path in kept.iterdir()} == {f"{NAME}.jpg", f"{NAME}.json"}
