"""Bundles: writing and opening, manifests, and probes."""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sopdeploy.base.project import Origin
from sopdeploy.bundle.folder import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    REQUIRED,
    open_bundle,
    read_manifest,
)
from sopdeploy.bundle.manifest import (
    ID_LENGTH,
    BatchRange,
    FileRecord,
    Manifest,
    TensorRecord,
    to_json,
)
from sopdeploy.bundle.probes import (
    Probes,
    check_replays,
    read_probes,
    replay,
    replay_in_turn,
    write_probes,
)
from sopdeploy.bundle.publication import publish, seal, staging
from sopdeploy.errors import BundleError, ParityError, StorageError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.version import __version__
from tests.support.forged import FIELDS, LABELS, fill, flip, forge, write_hollow
from tests.support.strategies import json_values, texts

FILES = (*REQUIRED, "README.md")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hollow(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


def rename_entry(bundle: Path, old: str, new: str) -> None:
    """Rename a file in the manifest and update the bundle id."""
    fields = json.loads((bundle / MANIFEST).read_bytes())
    del fields["id"], fields["sha256"]
    fields["files"] = {
        new if name == old else name: record for name, record in fields["files"].items()
    }
    (bundle / MANIFEST).write_bytes(Manifest.model_validate_json(json.dumps(fields)).to_bytes())


@pytest.mark.parametrize("error", [None, BundleError("x"), KeyboardInterrupt()])
def test_the_staging_folder_is_hidden_and_never_stays(
    tmp_path: Path, error: BaseException | None
) -> None:
    with suppress(BundleError, KeyboardInterrupt), staging(tmp_path / "out") as folder:
        assert folder.parent.parent == tmp_path / "out"
        assert folder.parent.name.startswith(".")
        fill(folder)
        if error is not None:
            raise error

    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_an_error_that_names_the_destination(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"out: .*No space"), staging(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_an_unwritable_destination_is_an_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"file.*: .*\("), staging(tmp_path / below):
        pass


def test_a_published_bundle_is_named_by_its_content_and_readable_by_everyone(
    tmp_path: Path,
) -> None:
    before = os.umask(0o077)
    try:
        with staging(tmp_path) as folder:
            fill(folder)
            inode = (folder / "model.onnx").stat().st_ino
            path = publish(folder, seal(folder, FIELDS), tmp_path)
    finally:
        os.umask(before)

    assert (path / "model.onnx").stat().st_ino == inode
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o644}
    bundle = open_bundle(path)

    assert path.name == bundle.name == f"tiny-{bundle.manifest.id}"
    assert (bundle.labels, set(bundle.manifest.files)) == (tuple(LABELS), set(FILES))


def test_latest_is_a_relative_link_to_the_bundle_that_was_published_last(
    tmp_path: Path,
) -> None:
    first = write_hollow(tmp_path / "bundles")
    link = tmp_path / "bundles" / "latest"
    assert (link.readlink(), open_bundle(link).path) == (Path(first.name), first)

    second = write_hollow(tmp_path / "bundles", opset=17)
    assert link.readlink() == Path(second.name)

    write_hollow(tmp_path / "bundles")  # the bundle exists already
    assert link.readlink() == Path(first.name)

    (tmp_path / "bundles").rename(tmp_path / "moved")
    assert open_bundle(tmp_path / "moved" / "latest").name == first.name


def test_equal_content_is_published_once_and_nothing_replaces_a_bundle(tmp_path: Path) -> None:
    path = write_hollow(tmp_path)
    inode = (path / MANIFEST).stat().st_ino
    assert write_hollow(tmp_path) == path
    assert (path / MANIFEST).stat().st_ino == inode

    other = write_hollow(tmp_path, opset=17)
    assert {*tmp_path.iterdir()} == {path, other, tmp_path / "latest"}
    flip(path / "model.onnx", 0)
    with pytest.raises(BundleError, match=r"model\.onnx"):
        write_hollow(tmp_path)
    shutil.rmtree(path)
    other.rename(path)

    with pytest.raises(BundleError, match="another manifest"):
        write_hollow(tmp_path)


def test_an_identical_bundle_that_is_exported_again_gets_the_new_time(tmp_path: Path) -> None:
    path = write_hollow(tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    later = "2026-01-03T00:00:00.000000Z"

    assert write_hollow(tmp_path, exported_at=later) == path
    assert open_bundle(path).manifest.exported_at == later

    after = {file.name: file.read_bytes() for file in path.iterdir()}
    assert [name for name in before | after if before.get(name) != after.get(name)] == [
        MANIFEST
    ]


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def replace_with(create: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda file: (file.unlink(), create(file))


def link_to(target: Callable[[Path], Path]) -> Callable[[Path], object]:
    return lambda file: file.symlink_to(file.rename(target(file)))


# What a file is after the damage, and the word for it in the error of a file that is not the manifest
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "missing"),
    "too long": (grow, "bytes"),
    "the first bit flipped": (lambda file: flip(file, 0), "sha256"),
    "a folder": (replace_with(Path.mkdir), "a folder"),
    "a pipe": (replace_with(os.mkfifo), "a pipe"),
    "a link to a file outside": (link_to(lambda f: f.parent.parent / f.name), "a link"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [MANIFEST, "model.onnx"])
def test_a_file_of_another_kind_or_size_is_rejected(
    bundle: Path, name: str, damage: str
) -> None:
    change, word = DAMAGE[damage]
    change(bundle / name)
    word = "manifest" if name == MANIFEST else word

    with pytest.raises(BundleError, match=f"{bundle}.*{word}") as caught:
        open_bundle(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["", "nowhere", "a/file"])
def test_a_path_without_a_bundle_is_rejected(tmp_path: Path, place: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")

    with pytest.raises(BundleError, match=str(tmp_path / place)):
        open_bundle(tmp_path / place)


NAMES = ["", "..", "../outside", "/etc/passwd", "deeper/file", "..\\outside", "nul\0byte"]


@pytest.mark.parametrize("name", NAMES)
def test_only_plain_file_names_are_accepted(bundle: Path, name: str) -> None:
    (bundle / "deeper").mkdir()
    for path in (bundle.parent / "outside", bundle / "deeper" / "file"):
        path.write_bytes((bundle / "README.md").read_bytes())
    rename_entry(bundle, "README.md", name)

    with pytest.raises(BundleError, match="plain file name"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_bundle_without_a_required_file_is_not_opened(bundle: Path, name: str) -> None:
    rename_entry(bundle, name, "README.md")
    with pytest.raises(BundleError, match=f"lists no {name}"):
        open_bundle(bundle)


BODIES = {"empty": b"", "another format": b'{"format": "zip"}', "deep lists": b"[" * 9_000}


@pytest.mark.parametrize("case", BODIES)
def test_other_content_of_the_manifest_is_rejected(bundle: Path, case: str) -> None:
    (bundle / MANIFEST).write_bytes(BODIES[case])
    with pytest.raises(BundleError, match=r"manifest\.json: "):
        open_bundle(bundle)


def test_a_huge_manifest_is_rejected_without_reading_it(bundle: Path) -> None:
    with (bundle / MANIFEST).open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(BundleError, match=str(MAX_MANIFEST_BYTES)):
        read_manifest(bundle)


def test_a_bundle_is_opened_with_its_graph(bundle: Path) -> None:
    assert open_bundle(bundle).onnx.read() == (bundle / "model.onnx").read_bytes()


def test_a_file_is_parsed_only_if_its_hash_matches(bundle: Path) -> None:
    flip(bundle / "labels.json", 0)
    with pytest.raises(BundleError, match=r"labels\.json: .*sha256"):
        open_bundle(bundle)


LABEL_FILES: dict[str, tuple[bytes, str]] = {
    "one too few": (to_json(LABELS[:-1]), "2 .* 3 "),
    "an object": (to_json({"0": "ant"}), "a list"),
    "not JSON": (b"ant, bee, cat", ""),
    "a name that occurs twice": (to_json(["ant", "bee", "ant"]), "'ant'.*twice"),
    "a control character": (to_json(["ant", "bee", "c\x1b[2J"]), "control"),
}


@pytest.mark.parametrize("case", LABEL_FILES)
def test_invalid_labels_are_rejected_even_with_the_right_hash(bundle: Path, case: str) -> None:
    body, message = LABEL_FILES[case]
    (bundle / "labels.json").write_bytes(body)
    forge(bundle)

    with pytest.raises(BundleError, match=rf"labels\.json: .*{message}"):
        open_bundle(bundle)


MANIFEST_FILES = {"model.onnx": FileRecord(bytes=3, sha256="a" * 64)}


def manifest(**fields: Any) -> Manifest:
    return Manifest(**{**FIELDS, "files": MANIFEST_FILES, **fields}).with_written_defaults()


@settings(max_examples=20)
@given(
    model=st.from_regex(r"(head:)?(timm:)?[A-Za-z0-9._-]+", fullmatch=True),
    config=st.dictionaries(texts, json_values, max_size=4),
    detached=st.lists(texts, max_size=3),
)
def test_a_manifest_is_read_as_it_was_written(
    model: str, config: dict[str, Any], detached: list[str]
) -> None:
    written = manifest(model=model, config=config, detached=tuple(detached))
    assert Manifest.from_bytes(written.to_bytes()) == written


@pytest.mark.parametrize(("reading", "is_written"), [({}, False), ({"leave_out": "a"}, True)])
def test_how_a_folder_was_read_is_written_if_it_says_something(
    reading: dict[str, str], is_written: bool
) -> None:
    run = {"run": "a", "run_id": "b", "started": FIELDS["exported_at"], "data": "c"}
    origin = Origin(**run, num_images=2, num_classes=3, reading=reading)
    written = manifest(origin=origin)
    assert ("reading" in json.loads(written.to_bytes())["origin"]) == is_written

    # A file that has the empty one, as 0.3.0 wrote it, keeps its bytes.
    fields = written.model_dump(mode="json") | {"origin": origin.model_dump(mode="json")}
    earlier = Manifest.model_validate(fields)
    assert "reading" in json.loads(earlier.to_bytes())["origin"]
    assert Manifest.from_bytes(earlier.to_bytes()) == earlier == written


def test_the_id_is_first_and_depends_on_the_other_fields() -> None:
    one = manifest()
    assert one.to_bytes() == manifest().to_bytes()
    assert one.image_shape == (16, 16, 3)
    assert list(json.loads(one.to_bytes()))[:4] == ["id", "sha256", "format", "version"]
    assert json.loads(one.to_bytes())["id"] == one.id
    assert len(one.id) == ID_LENGTH

    others = [
        manifest(model="other"),
        manifest(project="other"),
        manifest(opset=19),
        manifest(config={"width": 5}),
        manifest(files={"model.onnx": FileRecord(bytes=3, sha256="b" * 64)}),
        manifest(batch=BatchRange(maximum=65)),
    ]

    assert len({one.id, *(other.id for other in others)}) == 7


def test_the_time_of_the_export_is_not_part_of_the_id() -> None:
    later = manifest(exported_at="2027-01-02T03:04:05.000000Z")
    assert later.id == manifest().id
    assert later.to_bytes() != manifest().to_bytes()

    for time in ("", "2026-01-02", "2026-01-02T03:04:05.000000+01:00", "2026-01-02T03:04:05Z"):
        with pytest.raises(ValueError, match="exported_at"):
            manifest(exported_at=time)


def edited(**changes: Any) -> bytes:
    return to_json({**json.loads(manifest().to_bytes()), **changes})


def lineage(**changes: Any) -> bytes:
    return edited(lineage={**json.loads(manifest().to_bytes())["lineage"], **changes})


VALID = manifest().to_bytes()

REFUSED: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{]", "not JSON"),
    "a list": (b"[]\n", "not a JSON object"),
    "an unknown key": (edited(extra=1), "^extra: "),
    "a newer version": (edited(version=2), rf"^version: 2, .*{re.escape(__version__)}"),
    "a version that is not a number": (edited(version=None), "^version: None"),
    "a field of a later version": (
        edited(extra=1, versions={"sopdeploy": "0.9.1"}),
        r"^extra: .*sopdeploy 0\.9\.1",
    ),
    "a nested field of a later version": (
        edited(
            versions={"sopdeploy": "0.9.1"},
            lineage={**json.loads(VALID)["lineage"], "recipe_sha256": "0" * 64},
        ),
        r"^lineage\.recipe_sha256: .*sopdeploy 0\.9\.1",
    ),
    "a value of a later version": (
        edited(versions={"sopdeploy": "0.9.1"}, precision="fp4"),
        r"^precision: .*fp4.*sopdeploy 0\.9\.1",
    ),
    "another format": (edited(format="zip"), "format: .*zip"),
    "an invalid hash": (lineage(onnx_root="xyz"), r"lineage\.onnx_root"),
    "a negative size": (
        edited(files={"a": {"bytes": -1, "sha256": "a" * 64}}),
        r"files\.a\.bytes",
    ),
    "batches out of order": (edited(batch={"minimum": 9, "optimum": 8}), "minimum <= optimum"),
    "another id": (edited(id="0" * 12), "was edited"),
    "no id": (to_json({k: v for k, v in json.loads(VALID).items() if k != "id"}), "was edited"),
    "a duplicate key": (
        VALID.replace(b'  "opset": 18', b'  "opset": 17,\n  "opset": 18'),
        "was edited",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_bytes_are_rejected(case: str) -> None:
    raw, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Manifest.from_bytes(raw)


IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)


def network(images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    means = images.mean(axis=(1, 2)).astype(np.float32)
    return {"logits": means, "gate": means[:, :2]}


PROBES = Probes(
    images=IMAGES, expected=network(IMAGES), tolerance={"logits": 1e-3, "gate": 1e-4}
)


def test_probes_are_read_as_written_and_have_equal_bytes(bundle: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_probes(tmp_path / name, PROBES)
    opened = open_bundle(bundle)
    outputs = [
        TensorRecord(name=name, dtype="float32", shape=(None, *values.shape[1:]))
        for name, values in PROBES.expected.items()
    ]
    fields = {"outputs": tuple(outputs), "preprocess": Preprocess(resize=4, crop=4)}
    content = (tmp_path / "a").read_bytes()
    of_probes = replace(
        opened,
        manifest=opened.manifest.model_copy(update=fields),
        contents={"probes.npz": content},
    )
    found = read_probes(of_probes)

    assert (found.images.dtype, found.tolerance) == (np.uint8, PROBES.tolerance)
    assert {values.dtype for values in found.expected.values()} == {np.dtype(np.float32)}
    np.testing.assert_equal((found.images, found.expected), (IMAGES, PROBES.expected))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 64])
def test_the_same_network_passes_at_every_batch_size(batch: int) -> None:
    sizes: list[int] = []
    found = replay(
        PROBES, lambda images: sizes.append(len(images)) or network(images), batch=batch
    )

    assert found.deviation == {"logits": 0.0, "gate": 0.0}
    assert (found.num_images, found.tolerance) == (5, PROBES.tolerance)
    assert (sum(sizes), max(sizes)) == (5, min(batch, 5))


def test_probes_of_several_sizes_run_in_turn() -> None:
    sizes: list[int] = []
    probes = {size: PROBES.in_whole_batches(size) for size in (1, 2, 4)}
    found = replay_in_turn(probes, lambda images: sizes.append(len(images)) or network(images))

    assert sizes == [1, 2, 4, 1, 2, 4, 1, 2, 1, 1]
    assert [(one.batch, one.num_images) for one in found] == [(1, 5), (2, 6), (4, 8)]


def test_a_replay_counts_the_images_whose_most_probable_class_changes() -> None:
    def run(images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        changes = (images == IMAGES[1]).all(axis=(1, 2, 3))[:, None]
        logits = network(images)["logits"]
        return {**network(images), "logits": np.where(changes, -logits, logits)}

    replays = replay_in_turn(dict.fromkeys((1, 2), PROBES), run)
    assert [(one.num_changed, one.num_images) for one in replays] == [(1, 5), (1, 5)]
    with pytest.raises(ParityError, match="1 of 5 images"):
        check_replays(replays)


Wrong = Callable[[NDArray[np.uint8]], dict[str, NDArray[Any]]]


def changed(
    change: Callable[[NDArray[np.float32]], NDArray[Any]], name: str = "logits"
) -> Wrong:
    return lambda images: {**network(images), name: change(network(images)[name])}


WRONG: dict[str, tuple[Wrong, str]] = {
    "slightly off": (changed(lambda v: v + 0.0011), r"'logits' .*0\.0011 .*0\.001"),
    "wrong second output": (changed(lambda v: v + 0.0005, "gate"), "'gate' deviates"),
    "NaN": (changed(lambda v: v * np.nan), "not finite"),
    "a missing class": (changed(lambda v: v[:, :-1]), "has another shape"),
    "no output": (lambda images: {"gate": network(images)["gate"]}, "'logits' is missing"),
}


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("case", WRONG)
def test_other_outputs_are_rejected(case: str, batch: int) -> None:
    run, message = WRONG[case]
    with pytest.raises(ParityError, match=message):
        replay(PROBES, run, batch=batch)


def test_probes_with_nan_never_pass() -> None:
    nan = np.full((5, 3), np.nan, np.float32)
    with pytest.raises(ParityError, match="is not finite"):
        replay(
            Probes(images=IMAGES, expected={"logits": nan}, tolerance={"logits": 1.0}), network
        )
