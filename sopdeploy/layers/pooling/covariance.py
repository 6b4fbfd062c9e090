"""Poolings of the covariance: iSQRT-COV, MPN-COV and the log-Euclidean one of DeepO2P; functions of matrices.

Papers: iSQRT-COV, section 3, and its table of post-compensations; fast-MPN-COV's ResNets and
VGG-D use it with d = 256 and N = 5, GSoP-Net2's released code with N = 3. Li et al., "Is
Second-order Information Helpful for Large-scale Visual Recognition?" (MPN-COV, ICCV 2017),
section 3, Eqs. (3) to (5); Ionescu et al., "Matrix Backpropagation for Deep Networks with
Structured Layers" (DeepO2P, ICCV 2015). Letters: B images or matrices, d channels, H height, W
width; Sigma = U diag(l) U^T; functions are of matrices A = U diag(l) U^T of C rows: f(A) = U
diag(f(l)) U^T.

The papers' gradient divides by l_i - l_j and is not finite where eigenvalues repeat, as they do
for dead channels and for fewer positions than channels. This module computes the same gradient
as U (K * U^T G U) U^T with K_ij = (f(l_i) - f(l_j)) / (l_i - l_j), or f' if l_i and l_j are too
close to divide.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sopdeploy.base.config import Count
from sopdeploy.errors import TrainingError
from sopdeploy.layers.covariance import TriangleIndices, covariance_matrix
from sopdeploy.layers.isqrt_cov import ISqrtCov, NewtonSchulzOptions
from sopdeploy.layers.pooling.base import PoolingConfig, ReducedPooling

EigenvalueFunction = Callable[[Tensor], tuple[Tensor, Tensor]]
LOGARITHM_EPS = 1e-3
TOO_CLOSE = 1e-5  # eigenvalues are equal up to this fraction of the largest one (float32)
NO_EIGEN_FORM = (
    "an eigendecomposition has no ONNX or TensorRT form; train with pooling "
    "isqrt, which takes the square root by matrix products; it can start from the weights of "
    "mpncov (docs/second-order.md)"
)
NO_SECOND_GRADIENT = (
    "the gradient through eigenvalues cannot be differentiated again; train with "
    "pooling isqrt, or with an optimizer other than AdaHessian"
)


def root_of_eigenvalues(lambda_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Compute f = l^0.5 of ascending eigenvalues (B, C) and f'; both are 0 where l is 0 up to rounding."""
    rounding = lambda_BC.shape[1] * torch.finfo(lambda_BC.dtype).eps

    # Eigenvalues up to this limit count as 0; for a matrix of zeros it is the smallest normal
    # float32.
    smallest_B1 = (lambda_BC[:, -1:] * rounding).clamp_min(torch.finfo(torch.float32).tiny)
    positive_BC = lambda_BC > smallest_B1

    # Where an eigenvalue counts as 0, 1 avoids a division by 0; the results are replaced below.
    base_BC = lambda_BC.where(positive_BC, 1.0)
    slope_BC = 0.5 * base_BC.pow(-0.5)
    return base_BC.pow(0.5).where(positive_BC, 0.0), slope_BC.where(positive_BC, 0.0)


def logarithm_of_eigenvalues(lambda_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Compute f = log(l + 1e-3) of ascending eigenvalues (B, C) and f'; l below 0, a rounding error, is 0."""
    shifted_BC = lambda_BC.clamp_min(0.0) + LOGARITHM_EPS
    return shifted_BC.log(), shifted_BC.reciprocal()


class SpectralFunction(torch.autograd.Function):
    """Autograd function that computes f(A) of symmetric matrices with a finite gradient; see `spectral`."""

    @staticmethod
    def forward(ctx: Any, a_BCC: Tensor, function: EigenvalueFunction) -> Tensor:
        """Decompose the matrices and apply f to the eigenvalues; the result is NaN if that fails."""
        try:
            lambda_BC, u_BCC = torch.linalg.eigh(a_BCC)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of NaN, which training reports
            u_BCC = torch.full_like(a_BCC, torch.nan)
            lambda_BC = u_BCC[:, 0]  # NaN, too

        ctx.function = function
        ctx.save_for_backward(lambda_BC, u_BCC)
        value_BC, _ = function(lambda_BC)
        return (u_BCC * value_BC[:, None, :]) @ u_BCC.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad_BCC: Tensor) -> tuple[Tensor, None]:
        """Compute the symmetric gradient of the matrix; raise `TrainingError` for second derivatives."""
        if torch.is_grad_enabled():
            raise TrainingError(NO_SECOND_GRADIENT)
        lambda_BC, u_BCC = ctx.saved_tensors

        symmetric_BCC = 0.5 * (grad_BCC + grad_BCC.transpose(1, 2))
        inner_BCC = u_BCC.transpose(1, 2) @ symmetric_BCC @ u_BCC
        inner_BCC = inner_BCC * _divided_differences(lambda_BC, ctx.function)
        return u_BCC @ inner_BCC @ u_BCC.transpose(1, 2), None


def _divided_differences(lambda_BC: Tensor, function: EigenvalueFunction) -> Tensor:
    """Compute K (B, C, C): the slope of *function* f between each two of the ascending eigenvalues l (B, C).

    K_ij is (f(l_i) - f(l_j)) / (l_i - l_j), or the mean of the derivatives f'(l_i) and f'(l_j) if
    l_i and l_j are too close.
    """
    value_BC, slope_BC = function(lambda_BC)
    gap_BCC = lambda_BC[:, :, None] - lambda_BC[:, None, :]
    rise_BCC = value_BC[:, :, None] - value_BC[:, None, :]
    mean_slope_BCC = 0.5 * (slope_BC[:, :, None] + slope_BC[:, None, :])

    # The last eigenvalue is the largest one.
    close_BCC = gap_BCC.abs() <= TOO_CLOSE * lambda_BC[:, -1:, None]
    # Where they are close, 1 avoids a division by 0; the results are not used.
    divisor_BCC = gap_BCC.masked_fill(close_BCC, 1.0)

    return torch.where(close_BCC, mean_slope_BCC, rise_BCC / divisor_BCC)


def spectral(a_BCC: Tensor, function: EigenvalueFunction) -> Tensor:
    """Compute f(A) (B, C, C) of symmetric matrices A (B, C, C): f of their eigenvalues."""
    return SpectralFunction.apply(a_BCC, function)


class ISqrtPooling(ReducedPooling):
    """Pool (B, C, H, W) maps to the triangle (B, d (d + 1) / 2) of the root of their covariance."""

    def __init__(self, config: "ISqrtPoolingConfig", channels: int) -> None:
        super().__init__(channels, config.width, linear=config.reduction == "linear")
        options = config.root_config(compensate=config.compensation == "norm")
        self.root = ISqrtCov(self.channels, options)
        self.out_features = self.root.out_features

        self.batch_norm: nn.Module = nn.Identity()
        if config.compensation == "batch_norm":
            self.batch_norm = nn.BatchNorm1d(self.out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Compute the vector (B, d (d + 1) / 2); `root` converts half-precision maps to float32."""
        return self.batch_norm(self.root(self.reduce(features)))


class ISqrtPoolingConfig(PoolingConfig, NewtonSchulzOptions):
    """`width` is d; `compensation` reverts the prenormalization.

    It multiplies by the root of the norm ("norm"), applies batch norm to the vector
    ("batch_norm", a percent worse in the paper), or does nothing ("none", which the paper could
    not train). `reduction` to d channels is the papers' convolution with batch norm and ReLU
    ("normalized"), or the convolution alone ("linear").
    """

    layer = ISqrtPooling
    kind: Literal["isqrt"] = "isqrt"
    width: Count = 256
    compensation: Literal["norm", "batch_norm", "none"] = "norm"
    reduction: Literal["normalized", "linear"] = "normalized"


class EigenPooling(TriangleIndices, ReducedPooling):
    """Pool (B, C, H, W) maps to the triangle (B, d (d + 1) / 2) of f(covariance)."""

    not_exportable = NO_EIGEN_FORM

    def __init__(self, config: "MpnCovConfig | LogEuclideanConfig", channels: int) -> None:
        super().__init__(channels, config.width)

        self.function = (
            root_of_eigenvalues if config.kind == "mpncov" else logarithm_of_eigenvalues
        )
        self.out_features = self.channels * (self.channels + 1) // 2
        self.register_triangle(self.channels)

    def pool(self, features: Tensor) -> Tensor:
        """Compute the triangle (B, d (d + 1) / 2) of f(covariance) of a map (B, d, H, W)."""
        value_Bdd = spectral(covariance_matrix(features), self.function)
        return self.upper_triangle(value_Bdd)


class MpnCovConfig(PoolingConfig):
    """MPN-COV: the square root, the paper's power of 1/2, by eigenvalues."""

    layer = EigenPooling
    kind: Literal["mpncov"] = "mpncov"
    width: Count = 256


class LogEuclideanConfig(PoolingConfig):
    """DeepO2P: the logarithm of the covariance plus a small constant, because it requires positive values.

    DeepO2P neither centers nor reduces channels. Here the covariance is that of all other
    poolings, as in the MPN-COV paper's comparison with the log-Euclidean metric.
    """

    layer = EigenPooling
    kind: Literal["deepo2p"] = "deepo2p"
    width: Count = 256
