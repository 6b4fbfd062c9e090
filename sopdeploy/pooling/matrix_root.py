"""The square root of a symmetric matrix, by eigenvalues or by Newton-Schulz, for poolings that offer both.

Papers: Lin and Maji, "Improved Bilinear Pooling with CNNs" (BMVC 2017) compares the two.
Letters: B matrices of C rows.
"""

from typing import Annotated, Literal

import pydantic
from torch import Tensor

from sopdeploy.frozen import Frozen
from sopdeploy.pooling.covariance import frobenius_norm
from sopdeploy.pooling.isqrt_root import SMALLEST_NORM
from sopdeploy.pooling.newton_schulz import newton_schulz
from sopdeploy.pooling.spectral import power, spectral

NO_ROOT_FORM = (
    "an eigendecomposition has no ONNX or TensorRT form; train with root newton-schulz, which takes the "
    "square root by matrix products"
)


class RootConfig(Frozen):
    """How the root is taken: exactly, by eigenvalues, or by N = `iterations` steps, which can be exported.

    The steps start from the matrix over its Frobenius norm, nearer to the root than over its trace.
    """

    root: Literal["eigen", "newton-schulz"] = "eigen"
    iterations: Annotated[int, pydantic.Field(ge=1, le=15)] = 5

    @property
    def not_exportable(self) -> str | None:
        """Return why this root cannot be exported, `None` where it can."""
        return NO_ROOT_FORM if self.root == "eigen" else None


def square_root(a_BCC: Tensor, config: RootConfig) -> Tensor:
    """Return the root (B, C, C) of positive semi-definite matrices."""
    if config.root == "eigen":
        return spectral(a_BCC, power(0.5))[0]
    norm_B11 = frobenius_norm(a_BCC).clamp_min(SMALLEST_NORM)
    return newton_schulz(a_BCC / norm_B11, config.iterations) * norm_B11.sqrt()
