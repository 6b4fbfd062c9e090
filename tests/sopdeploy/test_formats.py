"""Files that sopdeploy 0.1.0 has written are read by every later version.

`pytest --rewrite-goldens tests/sopdeploy/test_formats.py` writes them; after the release of 0.1.0 only new
folders, for new versions of a format, are added.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.checkpoint import Checkpoint, build_classifier, load_plain, read_checkpoint, write_checkpoint
from sopdeploy.errors import CheckpointError, ConfigError, DataError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy.training import record as record_module
from sopdeploy.training.train import train_recipe
from sopdeploy_commands.bulk import classifier, output
from sopdeploy_commands.bulk.options import ClassifyOptions
from sopdeploy_commands.bulk.run import Classified, classify
from sopdeploy_commands.second_week.forget import forget
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.second_week.kept import KeptRecord, read_kept
from sopdeploy_service.settings import Settings
from tests.service.second_week.test_kept import NAME, record_of
from tests.sopdeploy.training.runs import few_digits, interrupt, short_recipe
from tests.support import quick_torch
from tests.support.service import picture_bytes, write_bundle

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
    with chdir(FOLDER):  # so that the rows name relative paths
        classify_kept(Path("classified"))
    hide_machine(FOLDER / "classified" / "_list.parquet")
    (FOLDER / "classified" / ".lock").unlink()
    with pytest.MonkeyPatch.context() as patch, few_digits(), quick_torch.one_thread():
        patch.setattr(record_module, "machine", dict)
        interrupt(TINY_RUN, FOLDER / "run", "step", 0, 2)


def hide_machine(listing: Path) -> None:
    """Replace the folder of this checkout, where the photographs are, in the *listing* of a run."""
    table = pq.read_table(listing)
    column = table.schema.get_field_index("location")
    places = [place.replace(str(FOLDER), "/photos") for place in table["location"].to_pylist()]
    pq.write_table(table.set_column(column, table.schema.field(column), pa.array(places)), listing)


TINY_RUN = short_recipe("epochs=1", "model.config.base_width=2")


def classify_kept(out: Path, **options: Any) -> Classified:
    """Classify the kept photograph with the bundle, both of format 1."""
    (bundle,) = Path("exported").glob("tiny-*")
    return classify(
        bundle, "kept", out, options=ClassifyOptions(workers=1, logits=True), threads=1, **options
    )


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


LATER: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a version": (
        lambda fields: fields.update(version=2),
        "version: 2, .* reads 1; read it with sopdeploy 9.8",
    ),
    "a field": (lambda fields: fields.update(camera=1), "camera: unknown here; read it with sopdeploy 9.8"),
}


@pytest.fixture
def classified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the outputs of `classify`, and work where they were written, with the runtime of then."""
    monkeypatch.chdir(FOLDER)
    name, version, *_ = json.loads(Path("classified", "_run.json").read_text())["runtime"].split()
    monkeypatch.setattr(f"{name}.__version__", version)  # a run is not continued with another version
    return Path(shutil.copytree("classified", tmp_path / "classified"))


def test_a_run_of_classify_is_continued_and_its_columns_are_kept(classified: Path) -> None:
    part = classified / "rows" / "part-00000.parquet"
    before = pq.read_table(part)
    assert classify_kept(classified).num_images == 1
    part.unlink()
    classify_kept(classified)
    after = pq.read_table(part)
    kept = [after.schema.field(field.name) for field in before.schema]
    assert kept == list(before.schema)
    assert [list(row) for row in after.to_pylist()] == [list(row) for row in before.to_pylist()]
    assert forget(f"{NAME}.jpg", [classified]) == [classified / "_list.parquet", part]


def test_a_later_version_may_add_fields_and_columns_to_a_run(
    classified: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LaterState(output.RunState):
        crops: int = 1

    monkeypatch.setattr(output, "RunState", LaterState)
    monkeypatch.setitem(classifier.COLUMNS, "camera", pa.string())
    assert classify_kept(classified).num_images == 1  # continues a run whose rows have no camera
    assert pq.read_table(classified / "rows").schema.names[0] == "path"


@pytest.mark.parametrize("case", LATER)
def test_a_run_of_a_later_version_names_who_reads_it(case: str, classified: Path) -> None:
    change, message = LATER[case]
    file = classified / "_run.json"
    fields = json.loads(file.read_text()) | {"written_by": "9.8"}
    change(fields)
    file.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=rf"_run\.json: {message}"):
        classify_kept(classified)
    assert json.loads(file.read_text()) == fields


def test_rows_of_a_later_version_are_not_rewritten(classified: Path) -> None:
    part = classified / "rows" / "part-00000.parquet"
    later = {b"sopdeploy.version": b"2", b"sopdeploy.written_by": b"9.8"}
    pq.write_table(pq.read_table(part).replace_schema_metadata(later), part)
    content = [path.read_bytes() for path in sorted(classified.rglob("*.parquet"))]
    with pytest.raises(DataError, match=r"part-00000\.parquet: version: 2, .* read it with sopdeploy 9\.8"):
        forget(f"{NAME}.jpg", [classified])
    assert [path.read_bytes() for path in sorted(classified.rglob("*.parquet"))] == content


def test_a_stopped_training_run_is_resumed(tmp_path: Path) -> None:
    out = Path(shutil.copytree(FOLDER / "run", tmp_path / "run"))
    with few_digits(), quick_torch.one_thread():
        resumed = train_recipe(TINY_RUN, out, resume=True)
    assert (resumed.num_epochs, read_checkpoint(out / "best.pt").training["epoch"]) == (1, 1)


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
