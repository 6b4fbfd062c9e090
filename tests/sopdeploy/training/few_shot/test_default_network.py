"""Vectors of photographs by a network with its initial weights."""

from pathlib import Path

import numpy as np
import pytest

from sopdeploy.training.few_shot import default_network
from sopdeploy.training.settings.recipe import read_recipe
from tests.sopdeploy.training.runs import paint


def test_photographs_become_vectors_of_length_one_and_other_files_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = ("preprocess.resize=16", "preprocess.crop=16")
    recipe = read_recipe(
        "photos", ["data.path=.", "start.weights=none", "model.name=resnet8", *sizes]
    )
    monkeypatch.setattr(default_network, "_default_recipe", lambda: recipe)
    paths = sorted(paint(tmp_path / "photos", 2).glob("*/*"))
    paths[1].write_bytes(b"no image")
    found = dict(default_network.embed_files(paths))

    assert list(found) == [paths[0], *paths[2:]]
    assert [float(np.linalg.norm(vector)) for vector in found.values()] == pytest.approx(
        [1.0] * len(found)
    )
