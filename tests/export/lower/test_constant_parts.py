"""Parts that no image reaches are evaluated once; those that an image reaches are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.prove.file import ParityReport
from sopdeploy_export.user_network.export_network import export_network
from tests.support.slow import mostly_slow
from tests.sweep.steps import write_file

DIM = 96  # from 91 on, the converter's optimizer leaves a constant of this size as it is
TRIANGLE = DIM * (DIM + 1) // 2


def upper() -> Tensor:
    return torch.ones(DIM, DIM).triu()


class Pooled(nn.Module):
    """A covariance of which `choose` takes the triangle."""

    def __init__(self, choose: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, DIM, 4, stride=4), nn.Linear(TRIANGLE, 3)
        self.register_buffer("mask", upper() > 0)
        self.choose = choose

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x).flatten(2)
        logits: Tensor = self.fc(self.choose(self, maps @ maps.transpose(1, 2)))
        return logits


def mask_of_positions() -> Tensor:
    mask = torch.zeros(DIM * DIM, dtype=torch.bool)
    mask[upper().reshape(-1).nonzero().squeeze(1)] = True
    return mask


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nonzero": lambda _, x: x.flatten(1)[:, upper().reshape(-1).nonzero()].flatten(1),
    "nonzero as a tuple": lambda _, x: x[:, *upper().nonzero(as_tuple=True)],
    "a mask of all positions": lambda _, x: x.flatten(1)[:, upper().reshape(-1) > 0],
    "a mask of rows and columns": lambda _, x: x[:, upper() > 0],
    "a mask that itself depends on positions": lambda _, x: x.flatten(1)[
        :, mask_of_positions()
    ],
    "a mask in a buffer": lambda network, x: x[:, network.mask],
}


def write(choose: Callable[[Any, Tensor], Tensor], folder: Path) -> ParityReport:
    """Write the file of a network that chooses elements, without its certificate."""
    network, preprocess = Pooled(choose).eval(), Preprocess(resize=8, crop=8)
    return write_file(network, preprocess, folder / "model.onnx", ExportOptions(), own=True)[1]


@pytest.mark.slow
def test_a_constant_choice_of_elements_is_exported_with_proof(tmp_path: Path) -> None:
    labels, preprocess = ["a", "b", "c"], Preprocess(resize=8, crop=8)
    options = {
        "labels": labels,
        "preprocess": preprocess,
        "name": "x",
        "options": ExportOptions(max_batch=1),
    }
    exported = export_network(Pooled(FORMS["nonzero"]), destination=tmp_path, **options)

    assert exported.parity.passed


@pytest.mark.parametrize(
    "form", mostly_slow([form for form in FORMS if form != "nonzero"], "a mask in a buffer")
)
def test_a_constant_choice_of_elements_is_lowered(form: str, tmp_path: Path) -> None:
    assert write(FORMS[form], tmp_path).passed


@pytest.mark.parametrize(
    "choose",
    [
        lambda _, x: x.flatten(1)[:, x.flatten(1)[0].nonzero()[:TRIANGLE, 0]],
        lambda _, x: x.flatten(1)[:, (x.flatten(1)[0] > -9).nonzero()[:TRIANGLE, 0]],
        lambda _, x: x[:, (x[0] > 0) | (upper() > 0)][:, :TRIANGLE],
        lambda _, x: x[:, (upper() > 0) | (x[0] > 0)][:, :TRIANGLE],
    ],
)
def test_a_choice_by_values_of_images_is_refused(
    choose: Callable[[Any, Tensor], Tensor], tmp_path: Path
) -> None:
    with pytest.raises(LoweringError, match=r"aten\.\S+ in forward"):
        write(choose, tmp_path)
