"""A run: its rows, its errors, and how it continues after an interruption."""

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy.decision import Decision, Rejection
from sopdeploy.errors import ConfigError, DataError
from sopdeploy_service.commands.batch import decoders
from sopdeploy_service.commands.batch.classifier import RowFormat
from sopdeploy_service.commands.batch.decoders import DecodedImage, DecoderProcesses
from sopdeploy_service.commands.batch.options import ClassifyOptions
from sopdeploy_service.commands.batch.output import OutputFolder
from sopdeploy_service.commands.batch.reader import ListedImage
from sopdeploy_service.commands.predict import predict_files
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.images.loaders import make_decoder
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.inference.results import NONFINITE
from sopdeploy_service.settings import Settings
from tests.service.bundle_with_outputs import write_bundle_with_outputs
from tests.service.commands.batch.conftest import (
    BAD,
    COUNT,
    OPTIONS,
    SETTINGS,
    StopError,
    classify,
    part_bytes,
    rows_of,
    stop_at,
)
from tests.service.commands.batch.crashing import start_crashing_worker
from tests.service.conftest import RULES


def test_every_image_gets_one_row_that_equals_its_prediction(complete, photos, bundle_path):
    rows, paths = rows_of(complete), sorted(photos.glob("*.jpg"))
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert len(part_bytes(complete)) == 4
    for row, path, one in zip(rows, paths, predict_files(bundle_path, paths, SETTINGS), strict=True):
        assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert row["bundle"] == bundle_path.name.rpartition("-")[2]
        assert row["error"] == (one.error.code if one.error else None)
        assert row["error_message"] == (one.error.detail if one.error else None)
        if one.error is None:
            assert row["classes"] == [entry.label for entry in one.classes]
            expected = [entry.probability for entry in one.classes]
            assert row["probabilities"] == pytest.approx(expected, abs=1e-6)
            assert row["warnings"] == list(one.warnings)
    assert {position for position, row in enumerate(rows) if row["error"]} == BAD.keys()
    assert pq.read_table(complete).to_pylist() == rows  # of the whole folder


def test_an_interrupted_run_continues_with_the_same_bytes(complete, bundle_path, photos, tmp_path):
    for done in (33, 100):
        with pytest.raises(StopError):
            classify(bundle_path, [str(photos)], tmp_path, SETTINGS, OPTIONS, stop_at(done))
    shown: list[tuple[int, int, int]] = []
    found = classify(
        bundle_path, [str(photos)], tmp_path, SETTINGS, OPTIONS, lambda *numbers: shown.append(numbers)
    )
    assert part_bytes(tmp_path) == part_bytes(complete)
    assert shown[-1] == (COUNT, len(BAD), COUNT)
    assert (found.num_images, found.num_errors, found.num_parts) == (COUNT, len(BAD), 4)
    assert found.classified == 4


def test_a_finished_run_is_not_repeated_and_a_damaged_part_is(complete, bundle_path, photos, tmp_path):
    out = shutil.copytree(complete, tmp_path / "out")
    part = out / "rows" / "part-00001.parquet"
    for damage, classified in ((part.read_bytes(), 0), (part.read_bytes()[:-9], 32)):
        part.write_bytes(damage)
        found = classify(bundle_path, [str(photos)], out, SETTINGS, OPTIONS)
        assert found.classified == classified
    assert part_bytes(out) == part_bytes(complete)


def test_incomplete_files_of_killed_processes_are_removed_before_and_after_the_rows(
    complete, bundle_path, photos, tmp_path
):
    def lose_a_machine(done: int, _errors: int, _total: int) -> None:
        (tmp_path / "rows" / f"part-00009.parquet.host.{done}.partial").touch()

    with pytest.raises(StopError):
        classify(bundle_path, [str(photos)], tmp_path, SETTINGS, OPTIONS, stop_at(33))
    lose_a_machine(0, 0, 0)
    classify(bundle_path, [str(photos)], tmp_path, SETTINGS, OPTIONS, lose_a_machine)
    assert part_bytes(tmp_path) == part_bytes(complete)


def test_a_folder_of_a_run_with_other_options_is_rejected(complete, bundle_path, photos):
    for settings, logits, message in (
        (Settings(threads=1, top_k=2), False, r"was begun with top_k 5, not 2; continue with"),
        (SETTINGS, True, r"was begun with logits False"),
        (Settings(threads=1, max_pixels=99), False, r"was begun with settings \{.*'max_pixels': "),
    ):
        options = OPTIONS.model_copy(update={"logits": logits})
        with pytest.raises(ConfigError, match=message):
            classify(bundle_path, [str(photos)], complete, settings, options)


def test_a_folder_of_another_bundle_or_of_other_images_is_rejected(
    complete, bundle_path, make_bundle, photos, tmp_path
):
    other = make_bundle(tmp_path, seed=1)
    with pytest.raises(ConfigError, match=r"was begun with bundle \w+, not \w+; continue"):
        classify(other, [str(photos)], complete, SETTINGS, OPTIONS)
    with pytest.raises(ConfigError, match=r"was begun with other images \(100 then, 1 now; names and sizes"):
        classify(bundle_path, [str(photos / "001.jpg")], complete, SETTINGS, OPTIONS)
    with pytest.raises(ConfigError, match="another run is writing"), OutputFolder(complete).locked():
        classify(bundle_path, [str(photos)], complete, SETTINGS, OPTIONS)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "x.parquet").touch()
    with pytest.raises(ConfigError, match=r"has rows, but no _run\.json; choose another folder"):
        classify(bundle_path, [str(photos)], tmp_path, SETTINGS, OPTIONS)


def test_logits_and_features_are_those_of_the_bundle(bundle_path, photos, tmp_path):
    path = write_bundle_with_outputs(bundle_path, tmp_path)
    options = ClassifyOptions(logits=True, features=True, workers=1)
    sources = [str(photos / name) for name in ("001.jpg", "017.jpg")]
    classify(path, sources, tmp_path / "out", SETTINGS, options)
    first, bad = rows_of(tmp_path / "out")
    loaded = load_model(path, SETTINGS)
    body = (photos / "001.jpg").read_bytes()
    pixels = make_decoder(SETTINGS)(EncodedImage(body), loaded.bundle.manifest.preprocess).pixels
    outputs = loaded.runtime.run(pixels[None])
    np.testing.assert_allclose(first["logits"], outputs["logits"][0], rtol=1e-5)
    np.testing.assert_allclose(first["features"], outputs[EMBEDDING][0], rtol=1e-5)
    assert (bad["error"], bad["logits"], bad["features"]) == ("not_an_image", None, None)


def decode_all(batches: list[list[ListedImage]]) -> list[tuple[str | None, bool]]:
    """Decode *batches* in two processes; list the error of each image and whether it has pixels."""
    with DecoderProcesses(RULES, SETTINGS, workers=2) as processes:
        return [
            (image.error, bool(pixels.any()))
            for _, (images, batch) in processes.decode(enumerate(batches))
            for image, pixels in zip(images, batch, strict=True)
        ]


def test_an_image_that_crashes_the_decoder_gets_an_error_and_no_other(photos, monkeypatch):
    monkeypatch.setattr(decoders, "start_worker", start_crashing_worker)
    paths = [photos / f"{number:03d}.jpg" for number in range(14, 32)]
    entries = [ListedImage(str(path), str(path)) for path in paths]
    found = decode_all([entries[:6], entries[6:12], entries[12:]])
    assert found == [("decoder_failed", False) if path.name == "017.jpg" else (None, True) for path in paths]


def test_a_killed_decoder_process_is_replaced(photos):
    entries = [ListedImage(str(path), str(path)) for path in sorted(photos.glob("00*.jpg"))]

    def tasks():
        yield entries[:5]
        for process in multiprocessing.active_children():
            process.kill()
        yield entries[5:]

    assert decode_all(tasks()) == [(None, True)] * 10


def test_rows_follow_the_decision_of_the_bundle(bundle):
    logits = np.array([[0, 1, 5, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1.0]], np.float32)
    images = [DecodedImage("a", "1"), DecodedImage("b", "2", ("exif_rotated",)), DecodedImage("c", "3")]
    outputs = [{"logits": logits[0]}, {"logits": logits[1]}, NONFINITE]
    rule = Rejection(score="max_probability", threshold=0.5)
    present = Decision(activation="sigmoid", thresholds=(0.6,) * 7)
    for decision, top_k, classes, known in (
        (None, 2, (["cat", "dog"], ["ant", "bee"]), [None, None]),
        (Decision(rejection=rule), 1, (["cat"], ["ant"]), [True, False]),
        (present, None, (["cat", "dog", "bee"], list(bundle.labels)), [None, None]),
    ):
        manifest = bundle.manifest.model_copy(update={"decision": decision})
        rows = RowFormat(replace(bundle, manifest=manifest), top_k, OPTIONS)
        table = rows.table(list(map(rows.row, images, outputs)))
        first, second, bad = table.to_pylist()
        assert (first["classes"], second["classes"]) == classes
        assert [first["known"], second["known"]] == known
        assert second["warnings"] == ["exif_rotated"]
        assert (bad["error"], bad["classes"]) == ("nonfinite_output", None)
        assert table.schema.metadata == {b"num_errors": b"1"}


def test_nothing_is_left_of_a_run_that_could_not_list_its_images(bundle_path, tmp_path):
    with pytest.raises(DataError, match=r"nowhere: not found; name a folder"):
        classify(bundle_path, ["nowhere"], tmp_path / "out", SETTINGS)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_file()] == [".lock"]


@pytest.mark.slow
def test_a_script_without_a_main_guard_runs_once(bundle_path, photos, tmp_path):
    script = tmp_path / "script.py"
    call = f"sopdeploy.classify({str(bundle_path)!r}, {str(photos)!r}, 'out', workers=2)"
    script.write_text(f"import sopdeploy\nprint({call}.images)")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{COUNT}\n", "")


@pytest.mark.slow
def test_after_ten_kills_the_rows_are_those_of_an_uninterrupted_run(
    complete, bundle_path, photos, tmp_path: Path
):
    """Kill after a growing number of images, so that every run makes progress."""
    for kill in range(1, 11):
        pid = os.fork()
        if not pid:

            def die(done: int, _errors: int, _total: int, limit: int = 10 * kill) -> None:
                if done >= limit:
                    os.kill(os.getpid(), signal.SIGKILL)

            classify(bundle_path, [str(photos)], tmp_path, SETTINGS, OPTIONS, die)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    classify(bundle_path, [str(photos)], tmp_path, SETTINGS, OPTIONS)
    assert part_bytes(tmp_path) == part_bytes(complete)
