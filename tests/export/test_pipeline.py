from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.bundle.probes import read_probes
from sopdeploy.checkpoint import Checkpoint, write_checkpoint
from sopdeploy.errors import DataError, DetachError, ParityError, SopdeployError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy_export import pipeline
from sopdeploy_export.pipeline import Exported, ExportOptions, export
from sopdeploy_export.proof.onnx_hash import file_root
from tests.export.once import proving_once

LABELS = tuple("abcdefghij")
SMALL = BatchRange(optimum=2, maximum=4)
DETACH = ExportOptions(detach=True, batch=SMALL)


def save(network: Classifier, name: str, path: Path, preprocess: Preprocess) -> Path:
    config = network.config.model_dump(mode="json")
    write_checkpoint(
        path,
        Checkpoint(
            model=name,
            config=config,
            weights=network.state_dict(),
            labels=LABELS,
            preprocess=preprocess,
            training={"epoch": 3},
        ),
    )
    return path


@pytest.fixture(scope="module")
def checkpoint(preprocess: Preprocess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.export.conftest import trained

    path = tmp_path_factory.mktemp("run") / "ckpt.pt"
    return save(trained(), "dsop-resnet8", path, preprocess)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    with proving_once():
        return export(checkpoint, tmp_path_factory.mktemp("bundles"), DETACH)


def test_the_bundle_opens_and_says_what_was_done(exported: Exported) -> None:
    bundle = open_bundle(exported.path)
    assert exported.path.name == bundle.name
    assert bundle.labels == LABELS
    assert bundle.manifest.detached == ("branches",)
    assert bundle.manifest.lineage.onnx_root == file_root(bundle.onnx) == exported.certificate.roots.onnx
    assert bundle.manifest.lineage.program_root == exported.certificate.roots.any_batch
    assert {path.name for path in exported.path.iterdir()} == {*bundle.manifest.files, "manifest.json"}


def test_the_graph_holds_no_weight_of_a_branch(exported: Exported) -> None:
    names = [tensor.name for tensor in onnx.load(exported.path / "model.onnx").graph.initializer]
    assert not [name for name in names if "branch" in name]
    assert {entry.name.split(".")[0] for entry in exported.certificate.removed} == {"branches"}


def test_two_exports_of_one_checkpoint_are_byte_identical(
    exported: Exported, checkpoint: Path, tmp_path: Path
) -> None:
    again = export(checkpoint, tmp_path, DETACH)
    assert again.path.name == exported.path.name
    for name in [*exported.manifest.files, "manifest.json"]:
        assert (again.path / name).read_bytes() == (exported.path / name).read_bytes(), name


def test_exporting_again_into_the_same_folder_finds_the_bundle_there(
    exported: Exported, checkpoint: Path
) -> None:
    with proving_once():
        assert export(checkpoint, exported.path.parent, DETACH).path == exported.path
    assert [path.name for path in exported.path.parent.iterdir()] == [exported.path.name]


def test_the_probes_hold_the_networks_own_numbers(exported: Exported) -> None:
    probes = read_probes(exported.path / "probes.npz")
    assert probes.images.shape == (12, 16, 16, 3)
    assert probes.expected["logits"].shape == (12, 10)
    assert probes.tolerance["logits"] == exported.parity.logits.tolerance


def test_photographs_join_the_probes(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (30, 20), (10, 200, 30)).save(tmp_path / "photos" / "one.jpg")
    options = DETACH.model_copy(update={"probes": tmp_path / "photos"})
    with proving_once():
        found = export(checkpoint, tmp_path / "out", options)
    assert len(read_probes(found.path / "probes.npz").images) == 13


def test_no_file_of_a_bundle_names_a_path_of_this_machine(exported: Exported, checkpoint: Path) -> None:
    here = [str(checkpoint.parent), str(Path.home()), str(Path(pipeline.__file__).parent), "site-packages"]
    for path in exported.path.iterdir():
        content = path.read_bytes()
        assert not [place for place in here if len(place) > 1 and place.encode() in content], path.name


def test_a_plain_network_is_certified_too(
    make: Callable[..., Classifier], preprocess: Preprocess, tmp_path: Path
) -> None:
    path = save(make("resnet8"), "resnet8", tmp_path / "plain.pt", preprocess)
    with proving_once():
        found = export(path, tmp_path / "out", ExportOptions(batch=SMALL))
    assert found.certificate.removed == ()
    assert found.manifest.detached == ()


def failing_comparison(*_: object, **__: object) -> None:
    raise ParityError("the exported file drifts")


def test_a_failed_comparison_leaves_nothing_behind(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "compare", failing_comparison)
    with proving_once(), pytest.raises(ParityError):
        export(checkpoint, tmp_path / "out", DETACH)
    assert list((tmp_path / "out").iterdir()) == []


def no_folder(tmp_path: Path) -> ExportOptions:
    return DETACH.model_copy(update={"probes": tmp_path / "nowhere"})


def empty_folder(tmp_path: Path) -> ExportOptions:
    (tmp_path / "empty").mkdir()
    return DETACH.model_copy(update={"probes": tmp_path / "empty"})


def text_for_picture(tmp_path: Path) -> ExportOptions:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "note.jpg").write_text("not a picture")
    return DETACH.model_copy(update={"probes": tmp_path / "text"})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (lambda _: ExportOptions(batch=SMALL), DetachError, "add --detach"),
        (no_folder, DataError, "no such folder"),
        (empty_folder, DataError, "no pictures in it"),
        (text_for_picture, DataError, "cannot be read as a picture"),
    ],
    ids=["training-only parts without --detach", "no folder", "an empty folder", "text for a picture"],
)
def test_a_wish_that_cannot_be_met_is_one_line_and_writes_nothing(
    checkpoint: Path,
    tmp_path: Path,
    options: Callable[[Path], ExportOptions],
    error: type[SopdeployError],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as problem:
        export(checkpoint, tmp_path / "out", options(tmp_path))
    assert "\n" not in str(problem.value)
    assert not (tmp_path / "out").exists()


def test_the_steps_are_told_in_order(checkpoint: Path, tmp_path: Path) -> None:
    told: list[str] = []
    with proving_once():
        export(checkpoint, tmp_path, DETACH, told.append)
    assert [step.split()[0] for step in told] == [
        "reading",
        "detaching",
        "proving",
        "lowering",
        "comparing",
        "writing",
    ]


def test_generated_probes_are_the_same_everywhere(preprocess: Preprocess) -> None:
    from sopdeploy_export.graph.probe_images import probe_images

    images = probe_images(preprocess)
    assert images.dtype == np.uint8
    assert np.array_equal(images, probe_images(preprocess))
    assert len(np.unique(images.reshape(12, -1), axis=0)) == 12
