"""An imported checkpoint against the network it came from: in float64, and in float32 within its noise."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.importers.fit import nest_settings
from sopdeploy.importers.import_weights import ImportOptions, ImportReport, import_weights
from sopdeploy.models.base import Classifier

NOISE = 3.0  # times the original's own distance from float64


def imported(source: Path, name: str, **options: Any) -> tuple[Classifier, ImportReport]:
    """Import *source* as *name*; `settings` has dotted keys."""
    settings = nest_settings(options.pop("settings", {}))
    out = source.with_name("imported.pt")
    report = import_weights(source, name, out, ImportOptions(settings=settings, **options))
    return build_classifier(read_checkpoint(out), out), report


def random_images(side: int) -> Tensor:
    """Make two images of different contrast, so that their covariances differ, too."""
    torch.manual_seed(1)
    return torch.randn(2, 3, side, side) * torch.tensor([0.5, 2.0])[:, None, None, None]


@torch.no_grad()
def assert_same_logits(ours: nn.Module, original: nn.Module, images: Tensor) -> None:
    """Compare the logits in float64, and in float32 within the noise of *original*."""
    exact = original.double()(images.double())
    noise = (original.float()(images.float()).double() - exact).abs().max()
    ours32 = ours.float()(images.float()).double()
    ours64 = ours.double()(images.double())
    assert (exact[0] - exact[1]).abs().max() > 1e-3, "logits that do not differ prove nothing"
    torch.testing.assert_close(ours64, exact, rtol=1e-7, atol=1e-7)
    assert (ours32 - exact).abs().max() <= NOISE * noise
