"""An operator without ONNX form is refused in one line with its place in the network and what to do."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.bundle.second_order import Root, count_second_order
from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.capture.program import capture_any_batch
from sopdeploy_export.lower.to_onnx import lower
from tests.export.once import ALONE

DOCS = Path(__file__).parents[3] / "docs"
linalg = torch.linalg
ROOT = "sopdeploy.layers.ISqrtCov"
CONSTANT = "__init__"
OTHER = "use other operators"


def eigen_root(matrix: Tensor) -> Tensor:
    values, vectors = linalg.eigh(matrix)
    return (vectors * values.sqrt().unsqueeze(1)) @ vectors.mT


def eigen_logarithm(matrix: Tensor) -> Tensor:
    values, vectors = linalg.eigh(matrix)
    return (vectors * values.log().unsqueeze(1)) @ vectors.mT


def singular_root(matrix: Tensor) -> Tensor:
    u, values, v = torch.svd(matrix)
    return (u * values.sqrt().unsqueeze(1)) @ v.mT


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "a root by eigh": (eigen_root, "linalg_eigh", ROOT),
    "a logarithm by eigh": (eigen_logarithm, "linalg_eigh", "logarithm"),
    "a root by svd": (singular_root, "linalg_svd", ROOT),
    "the largest singular value": (lambda m: m / linalg.svdvals(m)[:, :1, None], "svd", ROOT),
    "eigenvalues": (lambda m: linalg.eigvalsh(m)[:, :, None], "linalg_eigh", ROOT),
    "an inverse": (linalg.inv, "linalg_inv", CONSTANT),
    "a negative power": (lambda m: linalg.matrix_power(m, -1), "linalg_inv", CONSTANT),
    "equations": (lambda m: linalg.solve(m, m), "linalg_solve", CONSTANT),
    "triangular equations": (
        lambda m: linalg.solve_triangular(m, m, upper=True),
        "solve_triangular",
        CONSTANT,
    ),
    "a Cholesky factor": (linalg.cholesky, "cholesky", CONSTANT),
    "orthogonal factors": (lambda m: linalg.qr(m)[0], "linalg_qr", CONSTANT),
    "an exponential": (linalg.matrix_exp, "matrix_exp", OTHER),
}


class SecondMoments(nn.Module):
    """A network whose logits are a function of the second moments of colors."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        matrix = images.flatten(2) @ images.flatten(2).mT + torch.eye(3)
        return self.function(matrix).mean(2)


LINE = SecondMoments.forward.__code__.co_firstlineno + 2  # of the call of `function`


def captured(network: nn.Module, batch: BatchRange = ALONE) -> torch.export.ExportedProgram:
    return capture_any_batch(network.eval(), Preprocess(resize=4, crop=4), batch)


@pytest.mark.parametrize("form", REFUSED)
def test_refused_operators_name_their_line_and_what_to_do(form: str) -> None:
    function, operator, remedy = REFUSED[form]
    program = captured(SecondMoments(function))
    with pytest.raises(LoweringError) as refused:
        lower(program, ("logits",))

    message = str(refused.value)
    assert message.isprintable()
    assert operator in message
    assert f"test_failures.py:{LINE} " in message
    assert remedy in message


@pytest.mark.parametrize("power", [1, 3])
def test_powers_of_matrices_are_lowered(power: int) -> None:
    program = captured(SecondMoments(lambda matrix: linalg.matrix_power(matrix, power)))
    assert lower(program, ("logits",)).graph.output[0].name == "logits"


def by_kernels_of_images(matrix: Tensor, convolve: Callable[..., Tensor] = F.conv2d) -> Tensor:
    """Convolve each matrix (3, 3) of the batch with a kernel that depends on it."""
    return convolve(matrix[None], matrix[:, None], padding=1, groups=matrix.shape[0])[0]


@pytest.mark.parametrize(
    ("convolve", "form"), [(F.conv2d, "unfold"), (F.conv_transpose2d, "fold")]
)
def test_a_kernel_for_each_image_is_refused_with_another_form(
    convolve: Callable[..., Tensor], form: str
) -> None:
    network = SecondMoments(partial(by_kernels_of_images, convolve=convolve))
    program = captured(network, BatchRange(optimum=1, maximum=4))
    with pytest.raises(LoweringError, match=rf"test_failures\.py:{LINE} .*F\.{form}\("):
        lower(program, ("logits",))


def unfolded(x: Tensor, kernel: Tensor) -> Tensor:
    return (kernel.flatten(2) @ F.unfold(x, (3, 3))).unflatten(2, (4, 3))


def folded(x: Tensor, kernel: Tensor) -> Tensor:
    return F.fold(kernel.flatten(2).mT @ x.flatten(2), (8, 7), (3, 3))


class KernelOfImage(nn.Module):
    """Convolves a part (B, 4, 6, 5) of each image with a kernel (B, *channels, 3, 3) of its own."""

    def __init__(
        self, form: Callable[[Tensor, Tensor], Tensor], channels: tuple[int, int]
    ) -> None:
        super().__init__()
        self.form = form
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        maps = F.interpolate(images, (6, 5))[:, [0, 1, 2, 0]]
        kernels = maps[:, None, :1, :3, :3].expand(-1, *self.channels, -1, -1)
        return self.form(maps, kernels).mean((2, 3))


# The form that the message gives, the grouped one, and the channels that a kernel begins with
FORMS = {
    "a convolution": (unfolded, F.conv2d, (8, 4)),
    "a transposed one": (folded, F.conv_transpose2d, (4, 8)),
}


@pytest.mark.parametrize("case", FORMS)
def test_the_form_that_the_message_gives_is_right_and_lowered(case: str) -> None:
    form, convolve, channels = FORMS[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 4, 6, 5, generator=generator)
    kernel = torch.rand(2, *channels, 3, 3, generator=generator)
    grouped = convolve(x.flatten(0, 1)[None], kernel.flatten(0, 1), groups=2)
    torch.testing.assert_close(form(x, kernel), grouped[0].unflatten(0, (2, 8)))

    program = captured(KernelOfImage(form, channels), BatchRange(optimum=1, maximum=4))
    assert lower(program, ("logits",)).graph.output[0].name == "logits"


def test_without_code_of_the_network_the_module_is_the_place() -> None:
    program = captured(nn.Sequential(nn.AdaptiveMaxPool2d(3), nn.Flatten()))
    with pytest.raises(LoweringError, match=r"adaptive_max_pool2d\.default in 0; "):
        lower(program, ("logits",))


def test_the_root_of_the_page_replaces_an_exact_root() -> None:
    page = (DOCS / "second-order.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import torch\n.*?def matrix_root.*?)```", page, re.DOTALL)
    assert code is not None
    namespace: dict[str, Any] = {}
    exec(code[1], namespace)  # noqa: S102 # the page of this repository

    # Also for a singular matrix, as of fewer positions than channels.
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 8, 8, generator=generator)
    factors[1, :, 3:] = 0
    matrices = factors @ factors.mT
    values, vectors = linalg.eigh(matrices.double())
    exact = (vectors * values.clamp_min(0).sqrt().unsqueeze(1)) @ vectors.mT
    root = namespace["matrix_root"](matrices)
    torch.testing.assert_close(root, exact.float(), rtol=0, atol=1e-3 * float(exact.max()))

    model = lower(captured(SecondMoments(namespace["matrix_root"])), ("logits",))
    assert count_second_order(model).roots == (Root(15, 42),)
