"""The real network and its photographs are what the other tests of this folder take them for."""

from pathlib import Path

import timm

from sopdeploy.checkpoint import load_plain


def test_the_weights_fit_the_network_of_timm(lite0_file: Path) -> None:
    network = timm.create_model("tf_efficientnet_lite0")

    missing = network.load_state_dict(load_plain(lite0_file), strict=False)

    assert not missing.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)


def test_the_photographs_are_eight_of_each_class(photos: Path) -> None:
    counts = {folder.name: len(list(folder.glob("*.jpg"))) for folder in photos.iterdir() if folder.is_dir()}

    assert counts == {"dress": 8, "hat": 8, "pants": 8, "shoes": 8}
