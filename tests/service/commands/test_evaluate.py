"""Evaluating a bundle gives exactly the same scores as `predict`."""

import shutil

import pytest

from sopdeploy.errors import DataError
from sopdeploy.evaluation.metrics import classification_report
from sopdeploy_service.commands.evaluate import scores_of_bundle
from sopdeploy_service.commands.predict import predict_files
from sopdeploy_service.settings import Settings

ONE_THREAD = Settings(threads=1)
COLORS = {"ant": (200, 30, 60), "bee": (90, 160, 30), "cat": (10, 90, 220), "dog": (200, 200, 20)}
REST = ("eel", "fox", "gnu")


def silent(_done: int, _all: int) -> None: ...


@pytest.fixture
def folder(tmp_path, make_picture):
    """Two images of each of the tiny bundle's seven classes, in two formats."""
    for label in (*COLORS, *REST):
        (tmp_path / label).mkdir()
        for number, kind in enumerate(("JPEG", "PNG")):
            color = COLORS.get(label, (40 * number, 120, 200))
            body = make_picture(color, size=(50 + 7 * number, 40), kind=kind)
            (tmp_path / label / f"{number}.{kind.lower()}").write_bytes(body)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    return tmp_path


def test_a_bundle_and_predict_agree_exactly(bundle_path, folder) -> None:
    progress: list[tuple[int, int]] = []
    labels, scores, facts = scores_of_bundle(
        bundle_path, folder, settings=ONE_THREAD, on_image=lambda *done: progress.append(done)
    )
    assert facts["bundle"] == bundle_path.name
    assert progress == [(done, 14) for done in range(1, 15)]
    paths = [path for label in labels for path in sorted((folder / label).iterdir())]
    predictions = predict_files(bundle_path, paths, Settings(threads=1, top_k=7))
    for one, prediction in zip(scores, predictions, strict=True):
        assert one.confidence == prediction.classes[0].probability
        assert [labels[index] for index in one.top5] == [c.label for c in prediction.classes[:5]]


def test_what_is_wrong_with_a_folder_is_named(bundle_path, folder) -> None:
    def must_fail(message: str) -> None:
        with pytest.raises(DataError, match=message):
            scores_of_bundle(bundle_path, folder, settings=ONE_THREAD, on_image=silent)

    (folder / "gnu" / "0.jpeg").write_bytes(b"text")
    must_fail(r"gnu/0\.jpeg: this is not an image")
    (folder / "fox").rename(folder / "yak")
    must_fail("yak is no class of the network, which knows ant, bee")


def test_a_class_without_images_is_a_note_and_the_others_are_measured(bundle_path, folder) -> None:
    for path in (folder / "fox").iterdir():
        path.unlink()
    shutil.rmtree(folder / "gnu")
    notes: list[str] = []
    labels, scores, _ = scores_of_bundle(
        bundle_path, folder, settings=ONE_THREAD, on_image=silent, log=notes.append
    )
    assert notes == [f"{folder}: no images of 2 of 7 classes: fox, gnu"]
    counts = {one.label: one.count for one in classification_report(labels, scores).classes if one.count}
    assert list(counts) == ["ant", "bee", "cat", "dog", "eel"]
