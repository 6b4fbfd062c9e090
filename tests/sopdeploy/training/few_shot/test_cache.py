"""The cache of photographs' features: what is found again, what is computed anew, and its limit."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch

from sopdeploy import images as decoding
from sopdeploy.data.sources import open_data
from sopdeploy.models.registry import create_model
from sopdeploy.training.few_shot import features
from sopdeploy.training.few_shot.cache import FeatureCache
from sopdeploy.training.settings.recipe import read_recipe
from tests.sopdeploy.training.runs import SMALL, paint

EACH, CLASSES = 3, 3


class Folder:
    """Computes the features of a folder of photographs; `computed` counts the photographs without entry."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.cache, self.patch, self.seed = root / "cache", patch, 0
        self.photos = paint(root / "photos", EACH)
        self.settings: list[str] = []
        self.computed = 0
        patch.setenv("XDG_CACHE_HOME", str(self.cache))
        write = FeatureCache.write

        def counted(cache: FeatureCache, *entry: Any) -> None:
            self.computed += 1
            write(cache, *entry)

        patch.setattr(FeatureCache, "write", counted)

    def compute(self) -> tuple[np.ndarray, list[str]]:
        """Compute the vectors of the photographs and the hashes of their pixels."""
        recipe = read_recipe("photos", [*SMALL, f"data.path={self.photos}", *self.settings])
        images = open_data(recipe.data).train

        # The weights do not depend on the number of classes, except in the last layer.
        torch.manual_seed(self.seed)
        name = recipe.model.name
        config = recipe.model.config
        state = create_model(name, num_classes=CLASSES, **config).state_dict()
        model = create_model(name, num_classes=len(images.labels), **config)
        own = model.state_dict()
        fitting = {key: value for key, value in state.items() if value.shape == own[key].shape}
        model.load_state_dict(fitting, strict=False)

        self.computed = 0
        outputs = features.CachedNetwork(features.full_head(recipe, model), recipe)
        found = features.compute_features(
            outputs, "gap+isqrt", images, lambda done, total: None
        )
        return np.concatenate([found.own, found.reduced], axis=1), found.hashes

    def entries(self) -> list[Path]:
        """List the files of the cache."""
        return sorted((self.cache / "sopdeploy" / "features").glob("*.features"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    return Folder(tmp_path, monkeypatch)


def add_photographs(folder: Folder) -> None:
    paint(folder.photos / "more", 1, seed=1)
    for photo in (folder.photos / "more").glob("*/*.png"):
        photo.rename(folder.photos / photo.parent.name / "new.png")
        photo.parent.rmdir()
    (folder.photos / "more").rmdir()


def add_class(folder: Folder) -> None:
    added = folder.photos / "black"
    added.mkdir()
    for photo in (paint(folder.photos.parent / "other", 1, seed=2)).glob("*/*.png"):
        photo.rename(added / f"{photo.parent.name}.png")


def replace_photograph(folder: Folder) -> None:
    other = next(paint(folder.photos.parent / "other", 1, seed=2).glob("*/*.png"))
    other.rename(next(folder.photos.glob("*/*.png")))


def truncate_entry(folder: Folder) -> None:
    entry = folder.entries()[0]
    entry.write_bytes(entry.read_bytes()[:-100])


def flip_bit(folder: Folder) -> None:
    entry = folder.entries()[0]
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)


def replace_content(folder: Folder) -> None:
    content = b"not a safetensors file"
    folder.entries()[0].write_bytes(crc32(content).to_bytes(4) + content)


def change_decoding(folder: Folder) -> None:
    code = Path(shutil.copytree(Path(decoding.__file__).parent, folder.photos.parent / "code"))
    (code / "pixels.py").write_bytes((code / "pixels.py").read_bytes() + b"\n")
    folder.patch.setattr("sopdeploy.training.few_shot.cache.files", lambda _package: code)


CHANGES: dict[str, tuple[Callable[[Folder], Any], int]] = {
    "nothing": (lambda folder: None, 0),
    "added photographs": (add_photographs, CLASSES),
    "an added class": (add_class, CLASSES),
    "a replaced photograph": (replace_photograph, 1),
    "another preprocessing": (
        lambda folder: folder.settings.append("preprocess.fit=pad"),
        EACH * CLASSES,
    ),
    "other code that decodes images": (change_decoding, EACH * CLASSES),
    "other weights": (lambda folder: setattr(folder, "seed", 1), EACH * CLASSES),
    "a truncated entry": (truncate_entry, 1),
    "an entry with a flipped bit": (flip_bit, 1),
    "an entry with other content and its checksum": (replace_content, 1),
    "a deleted entry": (lambda folder: folder.entries()[0].unlink(), 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_changed_is_computed_with_the_same_result(change: str, folder: Folder):
    folder.compute()
    assert folder.computed == EACH * CLASSES

    apply, expected = CHANGES[change]
    apply(folder)
    cached, cached_hashes = folder.compute()

    assert folder.computed == expected

    folder.compute()
    assert folder.computed == 0

    folder.patch.setenv("XDG_CACHE_HOME", str(folder.cache / "empty"))
    vectors, hashes = folder.compute()
    assert folder.computed == len(hashes) == len(set(hashes))
    assert (cached.tobytes(), cached_hashes) == (vectors.tobytes(), hashes)


@pytest.mark.parametrize("place", ["a-file", "relative"])
def test_without_a_usable_folder_the_features_are_the_same(
    place: str, folder: Folder, tmp_path: Path
):
    expected = folder.compute()[0]
    (tmp_path / "a-file").touch()
    folder.patch.chdir(tmp_path)
    folder.patch.setenv("XDG_CACHE_HOME", str(tmp_path / place) if place == "a-file" else place)

    assert np.array_equal(folder.compute()[0], expected)
    assert folder.computed == EACH * CLASSES
    assert not (tmp_path / "relative").exists()


def test_the_limit_deletes_the_entries_that_were_unused_longest(folder: Folder):
    folder.compute()
    recipe = read_recipe("photos", [*SMALL, f"data.path={folder.photos}"])
    network = features.full_head(
        recipe, create_model(recipe.model.name, num_classes=2, **recipe.model.config)
    )
    array = [np.zeros(1000, np.uint8)]
    for age, path in enumerate(folder.entries()):
        os.utime(path, (age, age))  # the first is the oldest
    oldest, *rest = folder.entries()
    total = sum(path.stat().st_size for path in folder.entries())
    cache = FeatureCache(network, recipe, limit=total)
    written = cache.mark_used(17)
    cache.write(written, array)

    assert written.exists()
    assert not oldest.exists()
    assert rest[-1].exists()
    assert sum(path.stat().st_size for path in folder.entries()) <= total


def test_entries_of_this_run_stay_when_the_folder_is_full(folder: Folder):
    recipe = read_recipe("photos", [*SMALL, f"data.path={folder.photos}"])
    network = features.full_head(
        recipe, create_model(recipe.model.name, num_classes=2, **recipe.model.config)
    )
    cache = FeatureCache(network, recipe, limit=2500)
    paths = [cache.mark_used(number) for number in range(4)]
    for path in paths:
        cache.write(path, [np.zeros(1000, np.uint8)])

    assert [path.exists() for path in paths] == [True, True, False, False]


@pytest.mark.parametrize("is_of_user", [True, False])
def test_features_of_a_network_whose_code_changed_are_computed_again(
    is_of_user: bool, folder: Folder, monkeypatch: pytest.MonkeyPatch
):
    if is_of_user:  # such a network has no entries at all
        monkeypatch.setattr("sopdeploy.training.few_shot.cache._PACKAGES", ("torch",))
    folder.compute()
    original = features.SecondOrderHead.head_inputs
    # No name of a class, weight or option tells the difference
    monkeypatch.setattr(
        features.SecondOrderHead,
        "head_inputs",
        lambda network, images: original(network, 0 * images),
    )
    vectors, _ = folder.compute()

    assert folder.computed == EACH * CLASSES
    assert folder.compute()[0].tobytes() == vectors.tobytes()
    assert folder.computed == (EACH * CLASSES if is_of_user else 0)

    folder.patch.setenv("XDG_CACHE_HOME", str(folder.cache / "empty"))
    assert folder.compute()[0].tobytes() == vectors.tobytes()
