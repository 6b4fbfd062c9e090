"""A run: its rows, its errors, and how it continues after an interruption."""

import codecs
import csv
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from sopdeploy.bundle.decision import Decision, Rejection
from sopdeploy.bundle.http_api import Classes
from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy.errors import ConfigError, DataError, RuntimeUnavailableError
from sopdeploy.images.decode import decode
from sopdeploy_commands.app import app
from sopdeploy_commands.classify import classifier, run
from sopdeploy_commands.classify.classifier import COLUMNS
from sopdeploy_commands.classify.options import ClassifyOptions
from sopdeploy_commands.classify.output import OutputFolder
from sopdeploy_commands.predict import predict
from sopdeploy_service.decoding import pool
from sopdeploy_service.inference import decoders
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.settings import Settings
from tests.commands.classify.conftest import (
    BAD,
    COUNT,
    OPTIONS,
    SETTINGS,
    StopError,
    classify,
    part_bytes,
    rows_of,
    stop_at,
    write_photos,
)
from tests.service.decoding.misbehaving import START
from tests.support.fake_runtime import FakeRuntime
from tests.support.forged import graph, write_computed
from tests.support.runtimes import Failing
from tests.support.service import LABELS, RULES, deciding, picture_bytes, write_bundle

BODY = picture_bytes()


def test_every_image_gets_one_row_that_equals_its_prediction(complete, photos, bundle_path):
    rows = rows_of(complete)
    paths = sorted(photos.glob("*.jpg"))
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert len(part_bytes(complete)) == 4

    for row, path, one in zip(rows, paths, predict(bundle_path, paths, threads=1), strict=True):
        assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert row["bundle"] == bundle_path.name.rpartition("-")[2]
        assert row["error"] == (one.error.code if one.error else None)
        assert row["error_message"] == (one.error.detail if one.error else None)
        if one.error is None:
            assert row["classes"] == [entry.label for entry in one.classes]
            expected = [entry.probability for entry in one.classes]
            assert row["probabilities"] == pytest.approx(expected, abs=1e-6)
            assert row["warnings"] == list(one.warnings)
            for field in set(COLUMNS) & set(Classes.model_fields) - {"classes", "warnings"}:
                assert row[field] == pytest.approx(getattr(one, field), abs=1e-6), field

    assert {position for position, row in enumerate(rows) if row["error"]} == BAD.keys()
    assert pq.read_table(complete).to_pylist() == rows  # of the whole folder


def test_an_interrupted_run_continues_with_the_same_bytes(
    complete, bundle_path, photos, tmp_path
):
    for done in (33, 100):
        with pytest.raises(StopError):
            classify(bundle_path, [str(photos)], tmp_path, SETTINGS, OPTIONS, stop_at(done))
    shown: list[tuple[int, int]] = []
    of_others = [tmp_path / "movie.download.partial", tmp_path / "rows" / "movie.partial"]
    for path in of_others:
        path.touch()

    def lose_a_machine(*numbers: int) -> None:
        shown.append(numbers)
        (tmp_path / "rows" / f"part-00009.parquet.host.{len(shown)}.partial").touch()

    # Incomplete files of killed processes are removed before and after the rows
    lose_a_machine(0, 0)
    found = classify(bundle_path, [str(photos)], tmp_path, SETTINGS, OPTIONS, lose_a_machine)
    assert all(path.exists() for path in of_others)
    of_others[1].unlink()
    assert part_bytes(tmp_path) == part_bytes(complete)
    assert shown[1] == (96, COUNT)
    assert shown[-1] == (COUNT, COUNT)
    assert (found.num_images, found.num_errors) == (COUNT, len(BAD))


def test_a_finished_run_is_not_repeated_and_a_damaged_part_is(
    complete, bundle_path, photos, tmp_path
):
    out = shutil.copytree(complete, tmp_path / "out")
    part = out / "rows" / "part-00001.parquet"
    for content, done_before in (
        (part.read_bytes(), COUNT),
        (part.read_bytes()[:-9], COUNT - 32),
    ):
        part.write_bytes(content)
        shown: list[int] = []
        classify(
            bundle_path,
            [str(photos)],
            out,
            on_image=lambda done, _, shown=shown: shown.append(done),
        )
        assert (shown[0], shown[-1]) == (done_before, COUNT)

    assert part_bytes(out) == part_bytes(complete)


def test_the_command_prints_how_many_images_have_an_error(
    complete, bundle_path, photos, tmp_path
):
    out = shutil.copytree(complete, tmp_path / "out")
    command = ["classify", str(bundle_path), str(photos), "--out", str(out)]
    shown = CliRunner().invoke(app, command)

    assert f"{COUNT}; {len(BAD)} with an error" in shown.output


def test_few_images_are_read_before_their_batch(bundle_path, tmp_path, monkeypatch):
    """Decoded images wait in memory."""
    images = OutputFolder.images
    begun: list[str] = []

    def count(folder, part):
        for image in images(folder, part):
            begun.append(image.path)
            yield image

    monkeypatch.setattr(OutputFolder, "images", count)
    ahead: list[int] = []
    classify(
        bundle_path,
        [str(write_photos(tmp_path / "photos", 60))],
        tmp_path / "out",
        Settings(threads=1, max_batch=4),
        ClassifyOptions(workers=1),
        lambda done, _: ahead.append(len(begun) - done),
    )
    assert max(ahead) == 4 + classifier.IMAGES_AHEAD


def test_a_folder_of_a_run_with_another_state_is_rejected(
    complete, bundle_path, photos, tmp_path
):
    for settings, logits, message in (
        (Settings(threads=1, top_k=2), False, r"was begun with top_k 5, not 2; continue with"),
        (SETTINGS, True, r"was begun with columns \[\], not \['logits'\]"),
        (Settings(threads=1, max_pixels=99), False, r"was begun with max_pixels \d+, not 99"),
    ):
        options = OPTIONS.model_copy(update={"logits": logits})
        with pytest.raises(ConfigError, match=message):
            classify(bundle_path, [str(photos)], complete, settings, options)

    other = write_bundle(tmp_path, seed=1)
    with pytest.raises(ConfigError, match=r"bundle \w+, not"):
        classify(other, [str(photos)], complete, SETTINGS, OPTIONS)

    with pytest.raises(ConfigError, match=r"images 100 \(\w+\), not 1"):
        classify(bundle_path, [str(photos / "001.jpg")], complete, SETTINGS, OPTIONS)

    with pytest.raises(ConfigError, match="another run"), OutputFolder(complete).locked():
        classify(bundle_path, [str(photos)], complete, SETTINGS, OPTIONS)

    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "x.parquet").touch()
    for state in ("", "{", "5"):  # none, or a damaged one
        (tmp_path / "_run.json").write_text(state)
        with pytest.raises(ConfigError, match=r"batch None, not 4"):
            classify(bundle_path, [str(photos)], tmp_path, SETTINGS, OPTIONS)


def test_logits_and_features_are_those_of_the_bundle(photos, tmp_path):
    path = write_bundle_with_outputs(tmp_path)
    options = ClassifyOptions(logits=True, features=True, workers=1)
    sources = [str(photos / name) for name in ("001.jpg", "017.jpg")]
    classify(path, sources, tmp_path / "out", SETTINGS, options)
    first, bad = rows_of(tmp_path / "out")
    loaded = load_model(path, SETTINGS)
    body = (photos / "001.jpg").read_bytes()
    rules = loaded.bundle.manifest.preprocess
    pixels = decode(body, rules, max_bytes=10**7, max_pixels=10**7).pixels
    outputs = loaded.runtime.run(pixels[None])
    np.testing.assert_allclose(first["logits"], outputs["logits"][0], rtol=1e-5)
    np.testing.assert_allclose(first["features"], outputs[EMBEDDING][0], rtol=1e-5)

    assert bad["error"] == "not_an_image"
    assert bad["logits"] is None
    assert bad["features"] is None


def test_images_that_end_their_decoder_have_the_rows_of_others(
    bundle_path, tmp_path, monkeypatch
):
    """One image ends every child that gets it, one is too large for a light child."""
    bodies = {
        "bad": START + b"die",
        "large": picture_bytes(size=(2000, 1600)),
        **dict.fromkeys("abcdefgh", BODY),
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.jpg").write_bytes(body)
    template = pool.DecoderTemplate("tests.service.decoding.misbehaving")
    monkeypatch.setattr(decoders, "shared_template", lambda: template)
    classify(bundle_path, [str(tmp_path)], tmp_path / "out", SETTINGS, OPTIONS)
    template.close()
    errors = {Path(row["path"]).stem: row["error"] for row in rows_of(tmp_path / "out")}

    assert errors == dict.fromkeys(bodies) | {"bad": "decoder_crashed"}

    monkeypatch.setattr(
        decoders, "shared_template", lambda: pool.DecoderTemplate("sopdeploy_service.absent")
    )
    with pytest.raises(RuntimeUnavailableError, match="decoder processes"):
        classify(bundle_path, [str(tmp_path)], tmp_path / "more", SETTINGS, OPTIONS)


RULE = Rejection(threshold=4.0)
SEVERAL = Decision(activation="sigmoid", thresholds=(0.6,) * 7)
# Decision, setting, classes of two images, known
DECISIONS = {
    "classes": (None, {"top_k": 2}, (["cat", "dog"], ["ant", "bee"]), [None, None]),
    "rejection": (Decision(rejection=RULE), {"top_k": 1}, (["cat"], ["ant"]), [True, False]),
    "several classes": (SEVERAL, {}, (["cat", "dog", "bee"], list(LABELS)), [None, None]),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_rows_follow_the_decision_of_the_bundle(case, bundle, photos, tmp_path, monkeypatch):
    decision, given, classes, known = DECISIONS[case]
    logits = np.array(
        [[0, 1, 5, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1.0], [np.nan] * 7], np.float32
    )
    runtime = FakeRuntime(num_classes=7, largest_batch=3)
    monkeypatch.setattr(runtime, "run", lambda _images: {"logits": logits})
    loaded = LoadedModel(bundle=deciding(bundle, decision), runtime=runtime, replays={})
    monkeypatch.setattr(classifier, "load_model", lambda *_: loaded)
    sources = [str(photos / f"{number:03d}.jpg") for number in range(3)]
    classify(bundle.path, sources, tmp_path / "out", Settings(threads=1, **given))
    first, second, bad = rows_of(tmp_path / "out")

    assert (first["classes"], second["classes"]) == classes
    assert [first["known"], second["known"]] == known
    assert bad["error"] == "nonfinite_output"
    assert bad["classes"] is None


@pytest.mark.parametrize(
    "runs", [{1, 3, 5}, {1, 2, 3, 4, 5, 6, 7}], ids=["one image", "all images"]
)
def test_a_run_ends_without_a_row_if_memory_is_lacking(
    runs, bundle, photos, tmp_path, monkeypatch
):
    runtime = Failing(dict.fromkeys(runs, "oom"))
    loaded = LoadedModel(bundle=bundle, runtime=runtime, replays={})
    monkeypatch.setattr(classifier, "load_model", lambda *_: loaded)
    sources = [str(photos / f"{number:03d}.jpg") for number in range(4)]

    with pytest.raises(RuntimeUnavailableError, match="run again"):
        classify(bundle.path, sources, tmp_path / "out", Settings(threads=1))
    assert not list((tmp_path / "out").glob("rows/*"))


@pytest.mark.nightly
def test_a_script_without_a_main_guard_runs_once(bundle_path, photos, tmp_path):
    script = tmp_path / "script.py"
    call = f"sopdeploy.classify({str(bundle_path)!r}, {str(photos)!r}, 'out', workers=2)"
    script.write_text(f"import sopdeploy\nprint({call}.num_images)")
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0
    assert done.stdout == f"{COUNT}\n"
    assert done.stderr == ""


GRAPH = """
maps (uint8[n, 32, 32, 3] images)
=> (float[n, 7] logits, float[n, 4] gates, float[n, 3] embedding)
<float[3, 7] weight, float[7] bias, float[7, 4] mixing, int64[2] axes = {2, 3}>
{
    wide = Cast <to = 1> (images)
    planes = Transpose <perm = [0, 3, 1, 2]> (wide)
    embedding = ReduceMean <keepdims = 0> (planes, axes)
    scores = MatMul (embedding, weight)
    logits = Add (scores, bias)
    mixed = MatMul (logits, mixing)
    gates = Softmax (mixed)
}
"""


def write_bundle_with_outputs(folder: Path) -> Path:
    """Write it into *folder*."""
    rng = np.random.default_rng(3)
    weight, bias, mixing = (
        rng.normal(size=size).astype(np.float32) for size in ((7, 3), 7, (7, 4))
    )
    model = graph(GRAPH, weight=(weight / np.float32(40)).T.copy(), bias=bias, mixing=mixing)
    images = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    return write_computed(folder, model, images, 1e-2, preprocess=RULES, labels=LABELS)


@pytest.mark.parametrize("out", ["rows.csv", "rows"])
def test_an_image_of_exactly_the_limit_is_classified(bundle_path, tmp_path, out):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in (0, 1):
        (folder / f"{number}.jpg").write_bytes(BODY + bytes(number))
    settings = {"threads": 1, "max_body_bytes": len(BODY)}
    found = run.classify(bundle_path, [str(folder)], tmp_path / out, **settings)

    assert (found.num_images, found.num_errors) == (2, 1)
    assert [bool(one.error) for one in predict(bundle_path, [folder], **settings)] == [
        False,
        True,
    ]


def test_a_csv_file_has_the_predictions_and_needs_no_extra(
    bundle_path, photos, tmp_path, monkeypatch
):
    for module in ("pyarrow", "fsspec"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("bulk.output", "bulk.sources", "bulk.classifier", "tables"):
        monkeypatch.delitem(sys.modules, f"sopdeploy_commands.{name}", raising=False)
    out = tmp_path / "new" / "results.CSV"
    shown = []
    found = run.classify(
        bundle_path,
        photos,
        out,
        on_image=lambda *numbers: shown.append(numbers),
        threads=1,
        top_k=2,
    )

    assert found.rows == out
    assert found.num_images == COUNT
    assert found.num_errors == len(BAD)
    assert shown[-1] == (COUNT, COUNT)
    with out.open(encoding="utf-8-sig", newline="") as file:  # the mark is for spreadsheets
        rows = list(csv.DictReader(file))

    assert out.read_bytes().startswith(codecs.BOM_UTF8)
    expected = predict(bundle_path, [photos], threads=1)  # the folder
    assert len(rows) == len(expected) == COUNT

    for row, one in zip(rows, expected, strict=True):
        assert row["image"] == one.image
        if one.error is None:
            first = one.classes[0]
            assert row["class"] == first.label
            assert row["probability"] == f"{first.probability:.4f}"
        assert row["error"] == ("" if one.error is None else one.error.detail)

    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("name", ["=1+1.jpg", "+1.jpg", "-1.jpg", "@a.jpg"])
def test_no_cell_of_a_csv_file_is_a_formula_for_a_spreadsheet(
    name, bundle_path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40), (200, 30, 60)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / name)
    run.classify(bundle_path, name, tmp_path / "results.csv", threads=1)
    with (tmp_path / "results.csv").open(encoding="utf-8-sig", newline="") as file:
        (row,) = csv.DictReader(file)

    assert row["image"] == f"'{name}"


FORMULAS = ('=HYPERLINK("http://127.0.0.1")', "-x", "+1", "@a", "=1")


def test_no_class_in_a_csv_file_is_a_formula_for_a_spreadsheet(photos, tmp_path) -> None:
    labels = (*FORMULAS, *LABELS[len(FORMULAS) :])
    bundle = write_bundle(tmp_path, labels=labels)
    run.classify(bundle, photos, tmp_path / "results.csv", threads=1)

    with (tmp_path / "results.csv").open(encoding="utf-8-sig", newline="") as file:
        named = {row["class"] for row in csv.DictReader(file)} - {""}

    assert named & {f"'{formula}" for formula in FORMULAS}
    assert named <= {f"'{formula}" for formula in FORMULAS} | {*LABELS}


def test_options_of_parquet_files_are_refused_for_a_csv_file(bundle_path, photos, tmp_path):
    for option in ({"logits": True}, {"workers": 2}, {"ray": "local"}):
        with pytest.raises(ConfigError, match="parquet"):
            run.classify(bundle_path, photos, tmp_path / "results.csv", **option)
    assert not any(tmp_path.iterdir())


def test_a_folder_without_images_is_named(bundle_path, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        predict(bundle_path, [tmp_path / "empty"])
