"""Each form gives the results of torch, also for infinities, NaN and ties, without operators that GPUs lack."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.lower import forms
from sopdeploy_export.lower.to_onnx import REJECTED, to_ir
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.prove.file import ParityReport
from tests.support.slow import mostly_slow
from tests.sweep.steps import write_file

SHAPES = [
    ((2, 12), (-1,)),
    ((2, 7), (-1,)),
    ((2, 6, 9), (1, 2)),
    ((2, 600, 5), (1,)),
    ((1, 8192), (1,)),
]


def complex_values(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, dtype=torch.complex64, generator=generator)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


# Zeros of both signs, ties, and numbers whose results cancel or overflow (10,).
SPECIAL = torch.tensor([0, -0.0, 1, 1, -3, 1e-9, -1e-9, -200, torch.inf, -torch.inf])
WITH_NAN = torch.cat([SPECIAL, torch.tensor([torch.nan])])
ORDINARY = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
LONG = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
ATOL = {"ordinary": 1e-5}  # sums can cancel; the others have relative errors only
INPUTS = {"special": SPECIAL, "with_nan": WITH_NAN, "ordinary": ORDINARY, "long": LONG}


def overwrite_positive(x: Tensor) -> Tensor:
    copied = x.clone()
    copied[copied > 0] = 5.0
    return copied


def attend(x: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x + 1, x, mask)


# Each form by its name: the input that it reads, and what it computes of it.
FORMS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "log_sigmoid": ("with_nan", F.logsigmoid),
    "log1p": ("with_nan", torch.log1p),
    "expm1": ("with_nan", torch.expm1),
    "atan2": ("special", lambda x: torch.atan2(x[:, None], x)),
    "sort": ("special", lambda x: x.sort(stable=True)[1].float()),
    "sort, the largest first": (
        "special",
        lambda x: x.sort(stable=True, descending=True)[1].float(),
    ),
    "argsort": ("special", lambda x: x.argsort(stable=True).float()),
    "index_put": ("with_nan", overwrite_positive),
    "squeeze.dim": ("ordinary", lambda x: x.squeeze(1)),
    "squeeze.dims": ("ordinary", lambda x: x[:, None].squeeze((1, 2))),
    "linalg_vector_norm": ("long", lambda x: torch.linalg.vector_norm(x, dim=1)),
    "attention of three axes": ("ordinary", lambda x: F.scaled_dot_product_attention(x, x, x)),
    "attention that may read nothing": ("ordinary", lambda x: attend(x[None], x @ x.mT > 2)),
    "attention with numbers that are added": (
        "ordinary",
        lambda x: attend(x[None], (x @ x.mT).log()),
    ),
    "atleast_1d": ("special", lambda x: torch.atleast_1d([x[0], x])[0]),
    "atleast_2d": ("special", lambda x: torch.atleast_2d([x, x])[1]),
    "atleast_3d": ("special", lambda x: torch.atleast_3d([x, x])[1]),
    "hstack of vectors": ("special", lambda x: torch.hstack([x, x])),
    "hstack of matrices": ("long", lambda x: torch.hstack([x, x])),
    "vstack": ("special", lambda x: torch.vstack([x, x])),
    "dstack": ("special", lambda x: torch.dstack([x, x])),
    "column_stack": ("special", lambda x: torch.column_stack([x, x])),
    "fft_fft": ("ordinary", lambda x: torch.fft.fft(x).real),
    "fft_ifft2": ("ordinary", lambda x: torch.fft.ifft2(x).real),
    "fft_rfftn": ("ordinary", lambda x: torch.fft.rfftn(x).real),
    "fft_irfft2": ("ordinary", torch.fft.irfft2),
    "fft_hfft": ("ordinary", torch.fft.hfft),
    "fft_ihfft": ("ordinary", lambda x: torch.fft.ihfft(x).real),
}


class AllForms(nn.Module):
    """Compute all of `FORMS`, each of its input."""

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        tensors = dict(zip(INPUTS, inputs, strict=True))
        return [function(tensors[name]) for name, function in FORMS.values()]


@pytest.fixture(scope="module")
def all_forms() -> onnx.ModelProto:
    with torch.no_grad():
        program = torch.export.export(AllForms(), tuple(INPUTS.values()))
    return ir.to_proto(to_ir(program.run_decompositions({}), [*INPUTS], [*FORMS]))


@pytest.fixture(scope="module")
def results(all_forms: onnx.ModelProto) -> dict[str, Tensor]:
    session = ort.InferenceSession(all_forms.SerializeToString())
    found = session.run([*FORMS], {name: x.numpy() for name, x in INPUTS.items()})
    return dict(zip(FORMS, map(torch.from_numpy, found), strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_a_form_gives_the_results_of_torch(name: str, results: dict[str, Tensor]) -> None:
    given, function = FORMS[name]
    expected = function(INPUTS[given])
    torch.testing.assert_close(
        results[name], expected, rtol=1e-5, atol=ATOL.get(given, 0), equal_nan=True
    )


def test_no_form_has_an_operator_that_a_gpu_lacks(all_forms: onnx.ModelProto) -> None:
    operators = {node.op_type for node in all_forms.graph.node}
    assert not operators & {*REJECTED, "DFT", "ReduceL2"}


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_transforms_are_those_of_torch(shape: tuple[int, ...], dim: tuple[int, ...]) -> None:
    values = complex_values(shape)
    real, half = values.real.contiguous(), torch.fft.rfftn(values.real, dim=dim)
    sizes = [shape[axis] for axis in dim]

    assert_close(forms.transform_real(real, dim=dim, onesided=True), half)
    assert_close(
        forms.transform_real(real, dim=dim, onesided=False), torch.fft.fftn(real, dim=dim)
    )
    assert_close(
        forms.transform_complex(values, dim=dim, forward=True), torch.fft.fftn(values, dim=dim)
    )

    backward = torch.fft.ifftn(values, dim=dim, norm="forward")
    assert_close(forms.transform_complex(values, dim=dim, forward=False), backward)

    half = complex_values(tuple(half.shape))
    expected = torch.fft.irfftn(half, s=sizes, dim=dim, norm="forward")
    assert_close(forms.transform_to_real(half, dim=dim, last_dim_size=sizes[-1]), expected)


@pytest.mark.parametrize("dim", [(1,), (1, 2), (-1, -2), (0, 2), None])
@pytest.mark.parametrize("keepdim", [False, True])
def test_a_norm_of_many_values_is_that_of_torch(
    dim: tuple[int, ...] | None, *, keepdim: bool
) -> None:
    values = complex_values((3, 300, 301)).real
    expected = torch.linalg.vector_norm(values.double(), 2, dim, keepdim).float()
    assert_close(forms.norm(values, 2, dim, keepdim), expected)


def sketch(x: Tensor) -> Tensor:
    first, second = torch.fft.fft(x), torch.fft.fft(x.roll(3, 1))
    return torch.fft.ifft(first * second).real


def global_filter(x: Tensor) -> Tensor:
    maps = torch.fft.rfft2(x.view(-1, 4, 4, 4), norm="ortho")
    return torch.fft.irfft2(
        maps * torch.tensor([1.0, 0.5, 0.25]), s=(4, 4), norm="ortho"
    ).flatten(1)


def bilinear(x: Tensor) -> Tensor:
    pairs = x[:, :, None] * x[:, None]
    return F.normalize((pairs.flatten(1).relu() + 1e-5).sqrt())[:, :64]


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "compact bilinear pooling": sketch,
    "a global filter": global_filter,
    "the norm of a bilinear vector": bilinear,
    "an axis of 64 that is not squeezed": lambda x: x.squeeze(1),
    "an axis that is squeezed among others": lambda x: x[:, None].squeeze((1, 2)),
}


class WithHead(nn.Module):
    def __init__(self, head: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.fc = nn.Conv2d(3, 4, 2, stride=2), head, nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(HEADS[self.head](self.conv(x).flatten(1)))
        return logits


def write(head: str, folder: Path, **options: Any) -> ParityReport:
    """Write the file of a network with *head*, without its certificate."""
    network, preprocess = WithHead(head).eval(), Preprocess(resize=8, crop=8)
    return write_file(
        network, preprocess, folder / "model.onnx", ExportOptions(**options), own=True
    )[1]


@pytest.mark.parametrize("head", mostly_slow(HEADS, "the norm of a bilinear vector"))
def test_the_file_computes_it_without_operators_that_a_gpu_lacks(
    head: str, tmp_path: Path
) -> None:
    output = write(head, tmp_path).outputs["logits"]
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert not operators & {"DFT", "ReduceL2", "If", "Loop"}
    assert output.largest_drift <= output.tolerance / 4


@pytest.mark.slow
def test_complex_numbers_are_refused_in_float16_with_their_operator(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"aten\.fft_fft\.default"):
        write("compact bilinear pooling", tmp_path, precision="fp16")
