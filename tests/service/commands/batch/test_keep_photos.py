"""`classify --keep` copies the photographs that a server would keep."""

import gc
import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest

from sopdeploy.errors import ConfigError
from sopdeploy.kept import read_kept
from sopdeploy_service.commands.batch.options import ClassifyOptions
from sopdeploy_service.kept_folder import KeptFolder
from sopdeploy_service.settings import Settings
from tests.service.commands.batch.conftest import BAD, COUNT, StopError, classify, rows_of, stop_at
from tests.service.test_keep import photos as scenes


def keeping(folder: Path) -> ClassifyOptions:
    return ClassifyOptions(workers=1, part_images=32, logits=True, keep=folder)


def test_the_sample_of_a_stopped_run_is_complete_after_the_next(bundle_path, photos, tmp_path) -> None:
    kept, settings = tmp_path / "kept", Settings(threads=1, keep_sample=1)
    with pytest.raises(StopError):
        classify(bundle_path, [str(photos)], tmp_path / "out", settings, keeping(kept), stop_at(40))
    gc.collect()
    classify(bundle_path, [str(photos)], tmp_path / "out", settings, keeping(kept))
    rows = {row["sha256"][:32]: row for row in rows_of(tmp_path / "out") if not row["error"]}
    found = read_kept(kept)
    assert {path.stem for path, _ in found} == set(rows)
    assert len(rows) == COUNT - len(BAD)
    for path, record in found:
        row = rows[path.stem]
        assert (record.bundle, record.model) == (row["bundle"], "tiny")
        assert record.labels[int(np.argmax(record.logits))] == row["classes"][0]
        assert record.logits == pytest.approx(row["logits"])


def test_members_of_an_archive_are_kept_without_their_place(bundle_path, tmp_path) -> None:
    bodies = scenes(40)
    for number, body in enumerate(bodies):
        (tmp_path / f"{number:02d}.jpg").write_bytes(body)
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for file in sorted(tmp_path.glob("*.jpg")):
            archive.add(file, file.name)
    settings = Settings(threads=1, keep_sample=0.5, keep=tmp_path / "of-a-server")
    classify(
        bundle_path, [str(tmp_path / "photos.tar")], tmp_path / "out", settings, keeping(tmp_path / "kept")
    )
    found = read_kept(tmp_path / "kept")
    hashes = [hashlib.sha256(body).hexdigest() for body in bodies]
    sample = {sha256[:32] for sha256 in hashes if int(sha256[:8], 16) < 2**31}
    assert {path.stem for path, record in found if "sample" in record.reasons} == sample
    assert not any(b"SECRET" in path.read_bytes() for path, _ in found)
    assert not (tmp_path / "of-a-server").exists()


def test_a_folder_of_a_running_server_is_refused(bundle_path, photos, tmp_path) -> None:
    server = KeptFolder(tmp_path / "kept", 10**6, 30)
    with pytest.raises(ConfigError, match="another process keeps photographs there"):
        classify(bundle_path, [str(photos)], tmp_path / "out", options=keeping(server.path))
    assert not (tmp_path / "out").exists()


def test_a_cluster_does_not_keep(bundle_path, photos, tmp_path) -> None:
    options = keeping(tmp_path / "kept").model_copy(update={"ray": "local"})
    with pytest.raises(ConfigError, match="one process writes to the folder"):
        classify(bundle_path, [str(photos)], tmp_path / "out", options=options)
    assert list(tmp_path.iterdir()) == []
