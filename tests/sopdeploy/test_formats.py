"""Files that other versions have written are read by this one, or refused with the version that reads them.

`tests/formats/write.py` writes an archive by the commands of a version; one of a release never
changes.
"""

import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import sopdeploy
from sopdeploy.base.config import OLDEST
from sopdeploy.base.files import MANIFEST
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import ID_LENGTH, Manifest, to_json
from sopdeploy.errors import BundleError, CheckpointError, ConfigError, SopdeployError
from sopdeploy.training.loop import run as loop_run
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy.training.train import train_recipe, train_run
from sopdeploy.weights.checkpoint import build_classifier, read_checkpoint
from sopdeploy.weights.tensor_files import load_plain
from sopdeploy_commands.classify import classifier, output
from sopdeploy_commands.classify.options import ClassifyOptions
from sopdeploy_commands.classify.run import Classified, classify
from sopdeploy_commands.verify import verify
from sopdeploy_service.settings import Settings
from tests.docs.reading import blocks
from tests.formats.write import OVERRIDES
from tests.support import quick_torch

ARCHIVES = {
    path.name.removesuffix(".tar.xz"): path
    for path in Path(__file__).parents[1].glob("formats/*.xz")
}
NEWEST = sopdeploy.__version__  # `make release` writes its archive
STOPPED = read_recipe("digits-dsop", [*OVERRIDES, "epochs=3", "project=digits-dsop"])
LATER = "9.8"
PAGE = Path(__file__).parents[2] / "docs" / "keep.md"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the files of a version, which no test may change."""
    folders: dict[str, Path] = {}

    def unpack(version: str) -> Path:
        if version not in folders:
            folders[version] = tmp_path_factory.mktemp("formats")
            with tarfile.open(ARCHIVES[version]) as archive:
                # Python 3.11.2 of Debian 12 has no filters.
                archive.extraction_filter = getattr(tarfile, "data_filter", None)
                archive.extractall(folders[version])  # noqa: S202 - a file of the repository
        return folders[version]

    return unpack


@pytest.fixture
def files(
    request: pytest.FixtureRequest,
    unpacked: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Copy the files of a version and work there, as the commands did that wrote them."""
    folder = shutil.copytree(unpacked(getattr(request, "param", NEWEST)), tmp_path / "files")
    monkeypatch.chdir(folder)
    return Path(folder)


each_version = pytest.mark.parametrize("files", sorted(ARCHIVES), indirect=True)


def bundle_in(files: Path) -> Path:
    (path,) = files.glob("bundles/*-*")
    return path


def test_every_release_of_a_version_that_is_read_has_an_archive() -> None:
    changelog = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[\d.]*)\]", changelog, re.MULTILINE)
    assert released[0] == NEWEST

    read = {name for name in released if (*map(int, name.split(".")),) >= OLDEST}
    assert ARCHIVES.keys() == read, "run tests/formats/write.py"


EARLIER = "0.2.0"


def test_a_bundle_of_an_older_version_says_to_export_it_again(files: Path) -> None:
    path = bundle_in(files)
    manifest = json.loads((path / MANIFEST).read_bytes())
    manifest["versions"]["sopdeploy"] = EARLIER
    (path / MANIFEST).write_bytes(to_json(manifest))

    with pytest.raises(BundleError, match=f"{EARLIER}.*export") as caught:
        open_bundle(path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_an_older_version_says_to_train_it_again(files: Path) -> None:
    path = files / "trained" / "best.pt"
    fields = load_plain(path, path.read_bytes())
    fields["training"]["versions"]["sopdeploy"] = EARLIER
    torch.save(fields, path)

    with pytest.raises(CheckpointError, match=f"{EARLIER}.*train"):
        read_checkpoint(path)


@each_version
def test_a_bundle_is_verified_and_keeps_its_id(files: Path) -> None:
    path = bundle_in(files)
    verified = verify(path, Settings(threads=1))

    assert (verified.bundle, verified.golden) == (path.name, 3)


@each_version
def test_a_checkpoint_is_read_with_its_decision(files: Path) -> None:
    with quick_torch.one_thread():
        checkpoint = read_checkpoint(files / "trained" / "best.pt")
        network = build_classifier(checkpoint, files)
        assert network(torch.zeros(1, 3, 8, 8)).shape == (1, 10)

    assert checkpoint.decision is not None
    assert checkpoint.origin is not None


@pytest.mark.slow
@each_version
def test_a_stopped_training_run_is_resumed(files: Path) -> None:
    with quick_torch.one_thread():
        resumed = train_recipe(STOPPED, files / "stopped", resume=True)

    assert resumed.num_epochs == 3
    assert read_checkpoint(files / "stopped" / "best.pt").training["epoch"] in {1, 2, 3}


def classify_again(files: Path, runtime: str, patch: pytest.MonkeyPatch) -> Classified:
    """Repeat the command that wrote `classified`, with its *runtime*: another one does not continue a run."""
    name, version, *_ = runtime.split()
    patch.setattr(f"{name}.__version__", version)
    options = ClassifyOptions(workers=1, logits=True)
    return classify(
        bundle_in(files), "photos", files / "classified", options=options, threads=1
    )


@pytest.fixture
def again(files: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Classified]:
    runtime = json.loads((files / "classified" / "_run.json").read_text())["runtime"]
    return lambda: classify_again(files, runtime, monkeypatch)


@each_version
def test_a_run_of_classify_is_continued_and_its_columns_are_kept(
    files: Path, again: Callable[[], Classified]
) -> None:
    part = files / "classified" / "rows" / "part-00000.parquet"
    before = pq.read_table(part)
    assert again().num_images == 1
    part.unlink()
    again()
    after = pq.read_table(part)

    assert [after.schema.field(field.name) for field in before.schema] == list(before.schema)
    assert [list(row) for row in after.to_pylist()] == [list(row) for row in before.to_pylist()]


def test_a_later_version_may_add_fields_and_columns_to_a_run(
    again: Callable[[], Classified], monkeypatch: pytest.MonkeyPatch
) -> None:
    class LaterState(output.RunState):
        crops: int = 1

    monkeypatch.setattr(output, "RunState", LaterState)
    monkeypatch.setitem(classifier.COLUMNS, "camera", pa.string())
    assert again().num_images == 1  # continues a run whose rows have no camera
    assert pq.read_table("classified/rows").schema.names[0] == "path"


def test_a_later_version_may_add_optional_fields(files: Path) -> None:
    class LaterManifest(Manifest):
        license: str = "unknown"

    raw = (bundle_in(files) / MANIFEST).read_bytes()
    later = LaterManifest.from_bytes(raw)
    assert later.license == "unknown"
    assert later.id == Manifest.from_bytes(raw).id
    assert later.to_bytes() == raw


def changed_at_every_depth(fields: Any) -> Iterator[tuple[str, Any]]:
    """Yield copies of *fields* of a later version, with what was changed: a version, or a key of a table."""
    places: list[tuple[Any, ...]] = [()]
    for place in places:
        table = find(fields, place)
        nested = table.items() if isinstance(table, dict) else enumerate(table[:1])
        places += [
            (*place, key) for key, value in nested if isinstance(value, dict | list | tuple)
        ]

    yield "version", {**deepcopy(fields), "version": 2}
    for place in places:
        changed = deepcopy(fields)
        table = find(changed, place)
        if isinstance(table, dict):
            table["camera"] = {"kind": "x"}
            yield ".".join(map(str, place)) or "top", changed


def find(fields: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        fields = fields[key]
    return fields


def check_refusals(fields: Any, read: Callable[[Any], object], *, ignored: set[str]) -> None:
    """Check that *read* refuses every change with one line that names the later version, or is `ignored`."""
    messages = {}
    for place, changed in changed_at_every_depth(fields):
        messages[place] = ""
        try:
            read(changed)
        except SopdeployError as error:
            messages[place] = str(error)

    assert {place for place, message in messages.items() if not message} == ignored
    wrong = {
        place: message
        for place, message in messages.items()
        if message and ("\n" in message or f"sopdeploy {LATER}" not in message)
    }

    assert wrong == {}


def test_a_bundle_of_a_later_version_names_who_reads_it(files: Path) -> None:
    path = bundle_in(files)
    manifest = json.loads((path / MANIFEST).read_bytes())
    manifest["versions"]["sopdeploy"] = LATER

    def read(fields: dict[str, Any]) -> None:
        fields = {key: value for key, value in fields.items() if key not in ("id", "sha256")}
        content = {key: value for key, value in fields.items() if key != "exported_at"}
        name = hashlib.sha256(to_json(content)).hexdigest()[:ID_LENGTH]
        digest = hashlib.sha256(to_json(fields)).hexdigest()
        (path / MANIFEST).write_bytes(to_json({"id": name, "sha256": digest, **fields}))
        open_bundle(
            shutil.copytree(path, files / f"{fields['project']}-{name}", dirs_exist_ok=True)
        )

    # Nothing that reads a bundle builds the network of its config.
    check_refusals(manifest, read, ignored={"config", "config.pooling"})


def test_a_checkpoint_of_a_later_version_names_who_reads_it(files: Path) -> None:
    def read(fields: Any) -> None:
        torch.save(fields, files / "later.pt")
        build_classifier(read_checkpoint(files / "later.pt"), files / "later.pt")

    path = files / "trained" / "best.pt"
    fields = load_plain(path, path.read_bytes())
    fields["training"]["versions"]["sopdeploy"] = LATER
    # `resume`, `--from` and the model card validate these tables; the others only describe the
    # training.
    described = {place for place, _ in changed_at_every_depth({"training": fields["training"]})}
    check_refusals(fields, read, ignored=described - {"version", "top", "training"})


@pytest.mark.slow
def test_a_stopped_run_of_a_later_version_names_who_resumes_it(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is not refused is not trained
    monkeypatch.setattr(loop_run, "fit_loop", lambda *_: (SimpleNamespace(seen=None), {}))
    path = files / "stopped" / "last.pt"
    fields = load_plain(path, path.read_bytes())
    training = fields["training"]
    resume = fields["resume"]
    training["versions"]["sopdeploy"] = LATER
    tensors = {name: resume.pop(name) for name in ("weights", "optimizer", "held_out")}

    def read(changed: Any) -> None:
        recipe = changed.pop("recipe")
        state = {**changed.pop("resume"), **tensors}
        torch.save(
            {**fields, **changed, "training": {**training, "recipe": recipe}, "resume": state},
            path,
        )
        train_run(STOPPED, files / "stopped", resume=True)

    described = {"recipe": training["recipe"], "resume": resume}
    with quick_torch.one_thread():
        # Arrays of a finished fit
        check_refusals(described, read, ignored={"resume.procedure"})


def test_a_run_of_classify_of_an_older_version_is_not_continued(
    files: Path, again: Callable[[], Classified]
) -> None:
    file = files / "classified" / "_run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "written_by": EARLIER}))

    with pytest.raises(ConfigError, match=EARLIER):
        again()


def test_a_run_of_classify_of_a_later_version_names_who_reads_it(
    files: Path, again: Callable[[], Classified]
) -> None:
    file = files / "classified" / "_run.json"

    def read(fields: Any) -> None:
        file.write_text(json.dumps(fields))
        again()

    later = {**json.loads(file.read_text()), "written_by": LATER}
    check_refusals(later, read, ignored=set())
    with pytest.raises(ConfigError, match=LATER):
        read({**later, "part_images": {"rows": 1}})


@pytest.mark.parametrize("files", ["0.3.0"], indirect=True)
def test_kept_photos_move_below_their_predicted_classes(files: Path) -> None:
    """By the program on the page, with the photos that 0.3.0 labelled."""
    kept = files / "kept"
    (record,) = kept.glob("*.json")
    fields = json.loads(record.read_text())
    predicted = fields["labels"][np.argmax(fields["logits"])]
    stem, suffix = fields["image"][:32], fields["image"][32:]
    (kept / f"{'1' * 32}.labelled").touch()

    # Labelled photos, of which one decides: it is of the sample, and its 16th digit is even.
    held_out = files / "photos-held-out" / "one"
    held_out.mkdir(parents=True, exist_ok=True)
    for digit, sample in itertools.product("67", ("-sample", "")):
        (held_out / f"{'0' * 15}{digit}{'0' * 16}{sample}.jpg").write_bytes(b"image")
    deciding = f"{'0' * 15}6{'0' * 16}-sample.jpg"

    (program,) = blocks(PAGE, "python")
    command = [sys.executable, "-c", program, "kept", "photos"]
    for _ in range(2):  # a second run changes nothing
        subprocess.run(command, cwd=files, check=True)

    moved = kept / predicted / f"{stem}-sample{suffix}"
    now = moved.with_suffix(".json")
    assert {path for path in kept.rglob("*") if path.is_file()} == {moved, now}
    reasons = {*json.loads(now.read_text())["data"]["reasons"].split(", ")}
    assert reasons == {"low_margin", "sample", "reported"}
    assert [path.name for path in (files / "photos" / "one").iterdir()] == [deciding]
    assert len([*held_out.iterdir()]) == 3
