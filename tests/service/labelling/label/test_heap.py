"""Photographs that nobody has sorted: their order, suggestions, equal names, and what is never touched."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from sopdeploy.photos.files import name_id
from sopdeploy_service.labelling.label.folders import GoneError, LabelFolders
from sopdeploy_service.labelling.label.heap import Vector
from tests.service.labelling.label.conftest import files_below, label_server
from tests.support.service import picture_bytes


def embed(paths: Sequence[Path]) -> Iterator[tuple[Path, Vector]]:
    """Give photographs whose names begin alike the same direction."""
    for path in paths:
        vector = np.zeros(3, np.float32)
        vector["abc".index(path.name[0])] = 1
        yield path, vector


@pytest.fixture
def heap(tmp_path: Path) -> Callable[..., LabelFolders]:
    def write(*names: str, **options: object) -> LabelFolders:
        (tmp_path / "heap").mkdir()
        for number, name in enumerate(names):
            content = b"notes" if name == "notes.txt" else picture_bytes((number, 100, 200))
            (tmp_path / "heap" / name).write_bytes(content)
        folders = LabelFolders(tmp_path / "heap", tmp_path / "photos", **options)
        if folders.suggestions.thread is not None:
            folders.suggestions.thread.join()
        return folders

    return write


def sort(folders: LabelFolders, name: str, label: str | None) -> None:
    folders.label(name_id(name), label)


def test_images_of_a_folder_wait_for_a_label_and_others_stay(heap, tmp_path):
    folders = heap("b 1.jpg", "a.JPEG", "notes.txt", ".hidden.jpg", f"{'0' * 32}.jpg")
    assert [photo.path.name for photo in folders.waiting.values()] == ["a.JPEG", "b 1.jpg"]
    sort(folders, "a.JPEG", "ant")
    sort(folders, "b 1.jpg", None)
    assert files_below(tmp_path) == {
        "photos/ant/a.JPEG", "photos-unknown/b 1.jpg", "heap/notes.txt", "heap/.hidden.jpg",
        f"heap/{'0' * 32}.jpg",
    }  # fmt: skip
    folders.undo()
    folders.undo()
    assert {"heap/a.JPEG", "heap/b 1.jpg"} <= files_below(tmp_path)
    assert not (tmp_path / "photos" / "ant").exists()


def test_a_photograph_never_replaces_another_one_with_its_name(heap, tmp_path):
    folders = heap("a.jpg")
    for name in ("a.jpg", "a-2.jpg"):
        (tmp_path / "photos" / "ant").mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "ant" / name).write_bytes(name.encode())
    sort(folders, "a.jpg", "ant")
    assert files_below(tmp_path / "photos") == {"ant/a.jpg", "ant/a-2.jpg", "ant/a-3.jpg"}
    assert (tmp_path / "photos" / "ant" / "a.jpg").read_bytes() == b"a.jpg"
    (tmp_path / "heap" / "a.jpg").write_bytes(b"new")
    with pytest.raises(GoneError, match="another photo has its name now"):
        folders.undo()
    assert (tmp_path / "heap" / "a.jpg").read_bytes() == b"new"


def test_classes_are_suggested_as_soon_as_each_has_two(heap):
    folders = heap(
        "a1.jpg", "a2.jpg", "a3.jpg", "b1.jpg", "b2.jpg", "b3.jpg", "c1.jpg", embed=embed
    )
    ids = {name: name_id(f"{name}.jpg") for name in ("a3", "b3", "c1")}
    for name, label in (("a1", "ant"), ("b1", "bee"), ("a2", "ant")):
        sort(folders, f"{name}.jpg", label)
        assert folders.probabilities(ids["a3"]) == {}
    sort(folders, "b2.jpg", "bee")
    assert folders.probabilities(ids["a3"])["ant"] > 0.99
    assert folders.probabilities(ids["b3"])["bee"] > 0.99
    order = [photo.path.name for photo in folders.waiting.values()]
    assert sorted(order) == ["a3.jpg", "b3.jpg", "c1.jpg"]
    folders.undo()
    assert folders.probabilities(ids["a3"]) == {}


def test_a_grid_has_what_is_suggested_and_photographs_that_look_alike_follow_each_other(heap):
    names = [f"{kind}{number}.jpg" for number in range(5) for kind in "abc"]
    folders = heap(*names, embed=embed)
    ids = {name: name_id(name) for name in names}
    assert folders.suggested() == {}  # nothing is sorted

    for kind in "ab":
        for number in range(2):
            sort(folders, f"{kind}{number}.jpg", kind)
    of_a = {ids[f"a{number}.jpg"] for number in (2, 3, 4)}
    suggested = folders.suggested()
    assert {*suggested} == {"a", "b"}
    assert of_a == {*suggested["a"][:3]}  # the surest ones

    first, *others = folders.upcoming("one", 3)
    kind = folders.waiting[first].path.name[0]
    assert {folders.waiting[one].path.name[0] for one in others} == {kind}
    assert not {first, *others} & {*folders.upcoming("two", 3)}


def test_kept_photographs_that_were_rejected_and_look_alike_may_be_a_new_class(
    keep, tmp_path: Path
) -> None:
    kinds: dict[str, str] = {}
    for number in range(16):
        kind = "a" if number < 7 else "bc"[number % 2] if number < 10 else "known"
        kinds[keep(number, reasons=("unknown",), known=kind == "known")] = kind
    kinds[keep(16, reasons=("sample", "unknown"), known=False)] = "a"  # it decides

    def embed_kinds(paths: Sequence[Path]) -> Iterator[tuple[Path, Vector]]:
        for path in paths:
            yield path, np.eye(3, dtype=np.float32)["abc".index(kinds[path.stem])]

    folders = LabelFolders(tmp_path / "kept", tmp_path / "photos", embed_kinds)
    folders.suggestions.thread.join()
    group = folders.maybe_new_class()
    assert {kinds[identity] for identity in group[:7]} == {"a"}
    assert len(group) == 10

    # With a label, they are no longer asked about, and five are too few.
    for identity in group[:5]:
        folders.label(identity, "ant")
    assert folders.maybe_new_class() == []
    with label_server(folders) as client:
        assert client.get("/grids").json() == {"grids": []}


def test_an_undone_label_is_forgotten_also_if_the_page_was_reloaded(heap):
    folders = heap("a1.jpg", "a2.jpg", "b1.jpg", "b2.jpg", "b3.jpg", embed=embed)
    sort(folders, "a1.jpg", "ant")
    sort(folders, "b1.jpg", "bee")

    def reload() -> dict[str, float]:
        folders.read()
        folders.suggestions.thread.join()
        return folders.probabilities(name_id("b3.jpg"))

    assert reload() == {}  # each class has one photograph
    for name, label in (("a2.jpg", "ant"), ("b2.jpg", "bee")):
        sort(folders, name, label)
    assert reload()["bee"] > 0.99
    for _ in range(4):
        folders.undo()
        assert reload() == {}
    for name, label in (
        ("a1.jpg", "bee"),
        ("a2.jpg", "bee"),
        ("b1.jpg", "ant"),
        ("b2.jpg", "ant"),
    ):
        sort(folders, name, label)
    assert reload()["ant"] > 0.99


def test_photographs_that_were_sorted_before_count(heap, tmp_path):
    for label, names in {"ant": ("a1.jpg", "a2.jpg"), "bee": ("b1.jpg", "b2.jpg")}.items():
        (tmp_path / "photos" / label).mkdir(parents=True)
        for name in names:
            (tmp_path / "photos" / label / name).write_bytes(b"x")
    folders = heap("b9.jpg", embed=embed)
    assert folders.probabilities(name_id("b9.jpg"))["bee"] > 0.99


def test_without_a_network_photographs_are_sorted_without_suggestions(heap):
    def fail(_paths: Sequence[Path]) -> Iterator[tuple[Path, Vector]]:
        raise OSError("the weights cannot be reached")

    folders = heap("a1.jpg", "a2.jpg", "b1.jpg", "b2.jpg", "b3.jpg", embed=fail)
    for name in ("a1.jpg", "a2.jpg", "b1.jpg", "b2.jpg"):
        sort(folders, name, name[0])
    assert folders.probabilities(name_id("b3.jpg")) == {}


def test_a_skipped_photograph_leaves_no_file(heap, tmp_path):
    folders = heap("a.jpg", "b.jpg")
    before = files_below(tmp_path)
    folders.skip(name_id("a.jpg"))
    folders.read()
    assert [photo.path.name for photo in folders.waiting.values()] == ["b.jpg"]
    assert files_below(tmp_path) == before
    folders.undo()
    assert len(folders.waiting) == 2


@pytest.mark.parametrize("suffix", ["", ".jpg", ".png", ".download"])
def test_the_server_shows_a_heap_and_ends_with_the_command_that_trains(heap, tmp_path, suffix):
    folders = heap(f"a{suffix}")
    with label_server(folders) as client:
        state = client.get("/state").json()
        (identity,) = state["next"]
        image = client.get(f"/images/{identity}")
        assert (image.status_code, image.headers["content-type"]) == (200, "image/jpeg")
        assert state["classes"] == []
        end = client.post(
            "/label", json={"id": identity, "kind": "class", "name": "ant"}
        ).json()
    assert (end["photograph"], end["left"]) == (None, 0)
    assert end["command"] == f"sopdeploy train --data {tmp_path / 'photos'}"
