"""Networks that take gray images: found by themselves, and the same images in training, file and server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from scipy.special import softmax
from torch import Tensor, nn

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.errors import ConfigError, LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize
from sopdeploy_commands.verify import verify
from sopdeploy_export.admit.network import prepared
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.user_network.admission import fit_channels, unused_modules
from sopdeploy_service.app import create_app
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings
from tests.export.user_network import networks as n
from tests.support.pictures import encoded

RULES = Preprocess(resize=n.SIDE, crop=n.SIDE, mean=0.45, std=0.22)


class OfChannels(nn.Sequential):
    """A convolution of images with so many *channels*, and a classifier."""

    def __init__(self, channels: int, side: int = n.SIDE) -> None:
        super().__init__(
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * side**2, n.CLASSES),
        )


class Changes(OfChannels):
    """Changes the images first, by a function."""

    def __init__(self, channels: int, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(channels)
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.change(images))


class Views(nn.Linear):
    """Takes three channels for three images."""

    def __init__(self) -> None:
        super().__init__(n.SIDE**2, n.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.view(-1, n.SIDE**2))


CHANNELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "a convolution of one channel": (lambda: OfChannels(1), 1),
    "a linear layer": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(n.SIDE**2, n.CLASSES)),
        1,
    ),
    "a view of one channel": (Views, 1),
    "it repeats the channel": (lambda: Changes(3, lambda x: x.repeat(1, 3, 1, 1)), 1),
    "it makes the images gray": (lambda: Changes(1, lambda x: x.mean(1, keepdim=True)), 3),
    "it takes both": (lambda: Changes(3, lambda x: x.expand(-1, 3, -1, -1)), 3),
    "RGB": (lambda: OfChannels(3), 3),
    "images of another size": (lambda: OfChannels(3, side=5), 3),
    "gray images of another size": (lambda: OfChannels(1, side=5), 1),
}


@pytest.mark.parametrize("case", CHANNELS)
def test_images_are_gray_if_the_network_takes_these_alone(case: str) -> None:
    build, channels = CHANNELS[case]
    network = build().train()
    with prepared(network) as ready:
        fitted = fit_channels(ready, RULES)
        assert fitted == (RULES.in_gray() if channels == 1 else RULES)
        assert fit_channels(ready, RULES.in_gray()).channels == 1

    assert network.training


REFUSED: dict[str, tuple[nn.Module, Preprocess, Any]] = {
    "two channels": (OfChannels(2), RULES, LoweringError),
    "twelve channels": (OfChannels(12), RULES, LoweringError),
    "RGB, with rules for gray images": (OfChannels(3), RULES.in_gray(), LoweringError),
    "gray, with the mean of RGB images": (OfChannels(1), n.PREPROCESS, ConfigError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_channels_are_refused(case: str) -> None:
    network, rules, error = REFUSED[case]
    with pytest.raises(error, match="channels"):
        unused_modules(network, rules)


def test_training_file_and_server_see_the_same_gray_image(tmp_path: Path) -> None:
    network = n.trained(OfChannels(1))
    exported = n.export_small(
        network, tmp_path, preprocess=RULES, options=ExportOptions(max_batch=1)
    )
    rules = exported.manifest.preprocess
    assert rules == RULES.in_gray()
    assert any("gray" in warning for warning in exported.warnings)
    assert "601" in (exported.path / "README.md").read_text()
    verify(exported.path)

    # A photo with colors, of the size of the input.
    random = np.random.default_rng(5)
    pixels = random.integers(0, 256, (n.SIDE, n.SIDE, 3), dtype=np.uint8)
    seen = Normalize(rules, torch.contiguous_format)(torch.from_numpy(pixels[None]))
    with torch.no_grad():
        trained_logits = network.eval()(seen)[0].numpy()

    settings = Settings(threads=1)
    runtime = OnnxRuntime(open_bundle(exported.path), settings)
    file_logits = runtime.run(pixels[None])["logits"][0]
    assert file_logits == pytest.approx(trained_logits, rel=1e-6)

    app = create_app({"small": load_model(exported.path, settings)}, settings)
    with TestClient(app, "http://localhost") as client:
        photo = encoded(Image.fromarray(pixels), "PNG")
        response = client.post("/v1/classify", content=photo)
    found = {row["label"]: row["probability"] for row in response.json()["classes"]}
    expected = softmax(trained_logits.astype(np.float64))
    assert found == pytest.approx(dict(zip("abcd", expected, strict=True)), abs=1e-5)
