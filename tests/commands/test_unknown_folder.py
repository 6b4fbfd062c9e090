"""The folder of unknown images of `sopdeploy train --unknown`."""

import shutil
from pathlib import Path

import pytest

from sopdeploy.errors import DataError
from sopdeploy.training.callback import Callback
from sopdeploy_commands.train import train
from tests.sopdeploy.training.runs import paint

pytestmark = pytest.mark.usefixtures("allow_random_features")


def test_unknown_images_may_be_in_a_flat_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos = paint(tmp_path / "photos", 4)
    flat = tmp_path / "flat"
    shutil.copytree(next(photos.iterdir()), flat)
    settings = ("model.name=resnet8", "preprocess.crop=16", "procedure.kind=few_shot")
    callback = Callback()
    warnings = list[str]()
    monkeypatch.setattr(callback, "on_warning", warnings.append)
    next(flat.iterdir()).rename(flat / f"{0:032x}.png")  # as a server names what it keeps
    train(
        photos,
        out=tmp_path / "run",
        callback=callback,
        weights="none",
        unknown=str(flat),
        set=settings,
    )

    assert any("1 photo" in line for line in warnings)
    with pytest.raises(DataError):
        train(photos, weights="none", unknown=str(flat / "missing"), out=tmp_path / "other")
