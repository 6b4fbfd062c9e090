"""iSQRT-COV: covariance pooling with an iterative matrix square root ("fast MPN-COV", "SR-SOP").

Paper: iSQRT-COV, section 3; DSoP section III-A uses it in every branch. Letters: B images, d
channels, M positions, N iterations; X is the centered map divided by sqrt(M). In the iteration
alone, B matrices have C rows and columns.

The root is a fixed number of matrix products, the Newton-Schulz iteration of Eq. (4): Y_0 = A,
Z_0 = I; T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z, for N steps. The first step uses Z = I and the
last one needs only one of Y and Z, so N steps take 3N - 3 products (N = 1 takes one for Y and
none for Z). The result is the truncated iterate, not the square root: at N = 5 it differs from
the root by 18 to 42 % on ReLU features. N is therefore part of the trained network and never
changes.

The iteration runs on A = X X^T / n or on the M x M Gram matrix G = X^T X / n. Every iterate is
a polynomial in A, so with Z_N the second iterate of Newton-Schulz on G, Y_N(A) = X Z_N(G) X^T /
n. G takes fewer products where M < 0.95 d (N = 5): 7 x 7 and 14 x 14 maps of 256 channels, 8 x
8 maps of 128. Both run in float32 or float64: in half precision the Gram matrix has negative
eigenvalues.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, assert_never

import pydantic
import torch
from torch import Tensor

from sopdeploy.base.config import StrictModel, from_options
from sopdeploy.layers.covariance import (
    TriangleIndices,
    at_least_float32,
    check_channels,
    covariance,
    covariance_factor,
    covariance_trace,
    deviations,
    frobenius_norm,
    without_autocast,
)
from sopdeploy.layers.export_hints import ExportHints

SMALLEST_NORM = 1e-12  # a constant map has norm 0; its root is then 0, with finite gradients
MAX_ITERATIONS = 15  # in float32 the root of a singular matrix is then still finite
Iterations = Annotated[int, pydantic.Field(ge=1, le=MAX_ITERATIONS)]
Prenorm = Literal["trace", "frobenius"]


class NewtonSchulzOptions(StrictModel):
    """Options of iSQRT-COV: `iterations` is N, `prenorm` the norm that divides the covariance.

    N is 5 in the papers and in fast-MPN-COV, 3 in the released GSoP-Net2 and GM-SOP.
    """

    iterations: Iterations = 5
    prenorm: Prenorm = "trace"

    def root_config(self, *, compensate: bool = True) -> "NewtonSchulzConfig":
        """Build the configuration of the matrix square root."""
        return NewtonSchulzConfig(
            iterations=self.iterations, prenorm=self.prenorm, compensate=compensate
        )


class NewtonSchulzConfig(NewtonSchulzOptions):
    """Options of the square root; `compensate` multiplies it by the root of the norm after the iteration.

    Examples:
        >>> config = sopdeploy.layers.NewtonSchulzConfig(iterations=3, prenorm="frobenius")
        >>> sopdeploy.layers.ISqrtCov(64, config).out_features
        2080
    """

    compensate: bool = True


class Step(NamedTuple):
    """One step: Y_k and Z_k (B, C, C), and T_k, which multiplies both; Z_0, the identity, is `None`."""

    y: Tensor
    z: Tensor | None
    t: Tensor

    def next_y(self) -> Tensor:
        """Compute Y_(k+1) = Y_k T_k, (B, C, C)."""
        return self.y @ self.t

    def next_z(self) -> Tensor:
        """Compute Z_(k+1) = T_k Z_k, (B, C, C)."""
        return self.t if self.z is None else self.t @ self.z


def newton_schulz_steps(a_BCC: Tensor, iterations: int) -> Iterator[Step]:
    """Yield the N steps on A, *a_BCC*, with T_k = (3 I - Z_k Y_k) / 2; the last one gives Y_N or Z_N.

    A is prenormalized: symmetric, ||I - A|| < 1. In float32 the iterates are finite up to N =
    15, for singular matrices too.
    """
    identity = torch.eye(a_BCC.shape[-1], dtype=a_BCC.dtype, device=a_BCC.device)

    # Z_0 is I, so T_0 is (3 I - A) / 2.
    step = Step(y=a_BCC, z=None, t=1.5 * identity - 0.5 * a_BCC)
    yield step

    for _ in range(iterations - 1):
        y_BCC = step.next_y()
        z_BCC = step.next_z()
        step = Step(
            y=y_BCC, z=z_BCC, t=torch.baddbmm(identity, z_BCC, y_BCC, beta=1.5, alpha=-0.5)
        )
        yield step


def newton_schulz_adjoint(
    f_grad_BCC: Tensor, ts: Sequence[Tensor], fs: Sequence[Tensor | None]
) -> Tensor:
    """Backpropagate through N steps: from the gradient of F_N to that of the input matrix, both (B, C, C).

    F is Y or Z. *f_grad_BCC* is symmetric. *ts* are T_0 .. T_(N-1), *fs* are F_0 .. F_(N-1):
    F_0 is the input matrix where F is Y, and `None`, the identity, where F is Z.

    Let W_k = Z_k Y_k, and T = T_k. T, W_k and F_k commute. A step computes

        T = (3 I - W_k) / 2,    F_(k+1) = F_k T,    W_(k+1) = T W_k T.

    Given are two gradients of the loss: W_grad by W_(k+1), and T_grad by T, as far as it comes
    through F_(k+1). With Q = W_grad T,

        T receives through W_(k+1):      Q W_k + (Q W_k)^T,
        W_k receives through W_(k+1):    T Q,
        W_k receives through T:          -(T_grad + T_grad^T) / 4 - (Q W_k + (Q W_k)^T) / 2.

    The sum of the last two is the gradient by W_k. As W_k = 3 I - 2 T, it is

        T Q - H - H^T    with    H = T_grad / 4 + Q W_k / 2 = T_grad / 4 - Q T + 1.5 Q.
    """
    # These are the gradients of F_(N-1) and T_(N-1).
    f_grad_BCC, t_grad_BCC = _factor_gradients(f_grad_BCC, fs[-1], ts[-1])

    # The gradient of W_(N-1) is -H - H^T with H = T_grad / 4: W_N has no gradient, so Q is 0.
    w_grad_BCC = -0.25 * (t_grad_BCC + t_grad_BCC.transpose(1, 2))

    # For k = N-2 .. 0, from the gradients of F_(k+1) and W_(k+1) to those of F_k and W_k:
    for t_BCC, f_BCC in zip(reversed(ts[:-1]), reversed(fs[:-1]), strict=True):
        f_grad_BCC, t_grad_BCC = _factor_gradients(f_grad_BCC, f_BCC, t_BCC)
        q_BCC = w_grad_BCC @ t_BCC
        # H = T_grad / 4 - Q T + 1.5 Q, then the gradient of W_k: (T Q - H) - H^T
        h_BCC = torch.baddbmm(t_grad_BCC, q_BCC, t_BCC, beta=0.25, alpha=-1.0).add_(
            q_BCC, alpha=1.5
        )
        w_grad_BCC = torch.baddbmm(h_BCC, t_BCC, q_BCC, beta=-1.0).sub_(h_BCC.transpose(1, 2))

    if fs[0] is None:  # F is Z, so the input matrix is only W_0; otherwise it is Y_0, too
        return w_grad_BCC
    return w_grad_BCC + 0.5 * (f_grad_BCC + f_grad_BCC.transpose(1, 2))


def _factor_gradients(
    f_grad_BCC: Tensor, f_BCC: Tensor | None, t_BCC: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of F_k and of T from that of F_(k+1) = F_k T; F is Y or Z, and Z_k T = T Z_k."""
    # F_0 is the identity, so F_1 is T. The caller does not use the gradient of F_0.
    if f_BCC is None:
        return f_grad_BCC, f_grad_BCC
    return f_grad_BCC @ t_BCC, f_BCC @ f_grad_BCC


class ISqrtCov(TriangleIndices, ExportHints):
    """Pool (B, d, H, W) maps to the upper triangle (B, d (d + 1) / 2) of the square root of their covariance.

    The square root is computed in float32 or float64, also under autocast. Training uses a handwritten
    gradient. Compilers and exporters trace the plain operations.

    Args:
        width: d, the number of channels of the map.
        config: The Newton-Schulz iteration; by default N = 5, divided by the trace.
        **options: The fields of `NewtonSchulzConfig`, in the place of *config*.

    Raises:
        ConfigError: An option is invalid, or `forward` gets a map with another number of channels.

    Examples:
        >>> pooling = sopdeploy.layers.ISqrtCov(64, iterations=3)
        >>> pooling(torch.rand(2, 64, 7, 7)).shape
        torch.Size([2, 2080])
    """

    keep_float32 = True

    def __init__(
        self, width: int = 256, config: NewtonSchulzConfig | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.width = width
        self.config = from_options(NewtonSchulzConfig, config, options)
        self.out_features = width * (width + 1) // 2
        self.register_triangle(width)

    def forward(self, features_BdHW: Tensor) -> Tensor:
        """Compute the upper triangle, row by row; raises `ConfigError` for another number of channels."""
        check_channels(self, features_BdHW, self.width)
        triangle = self.triangle_for(features_BdHW)

        # Only eager training has the handwritten gradient; compilers and exporters trace the
        # last line, and `torch.func` transforms it.
        trains = features_BdHW.requires_grad and torch.is_grad_enabled()
        is_transformed = (
            torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        )
        with without_autocast(features_BdHW):
            if trains and not is_transformed:
                return ISqrtVector.apply(features_BdHW, triangle, self.config)
            return isqrt_vector(features_BdHW, triangle, self.config)


def gram_is_cheaper(channels: int, positions: int, iterations: int) -> bool:
    """Decide whether N *iterations* on G (M x M) are cheaper than on A (d x d); symbolic shapes use A."""
    if type(positions) is not int or type(channels) is not int:
        return False

    # Products of two square matrices, as counted at the top of this file.
    products = max(1, 3 * iterations - 3)

    # On G, X^T X and X Z_N also take d M^2 each. Left out: X X^T on A and (X Z_N) X^T on G, d^2
    # M each.
    return products * positions**3 + 2 * channels * positions**2 < products * channels**3


class Prenormalized(NamedTuple):
    """X (B, d, M), its norm n (B, 1, 1), and the `matrix` A (B, d, d), or with `use_gram` G (B, M, M)."""

    x: Tensor
    norm: Tensor
    matrix: Tensor
    use_gram: bool


def prenormalize(features_BdHW: Tensor, config: NewtonSchulzConfig) -> Prenormalized:
    """Compute A or G: center the map, compute X X^T or X^T X, divide it by its trace or Frobenius norm."""
    x_BdM = covariance_factor(at_least_float32(features_BdHW))
    use_gram = gram_is_cheaper(x_BdM.shape[1], x_BdM.shape[2], config.iterations)
    matrix_Bnn = covariance(x_BdM.transpose(1, 2) if use_gram else x_BdM)

    if config.prenorm == "trace":
        norm_B11 = covariance_trace(matrix_Bnn)
    elif config.prenorm == "frobenius":
        norm_B11 = frobenius_norm(matrix_Bnn)
    else:
        assert_never(config.prenorm)

    norm_B11 = norm_B11.clamp_min(SMALLEST_NORM)
    return Prenormalized(x_BdM, norm_B11, matrix_Bnn / norm_B11, use_gram)


def covariance_root(features_BdHW: Tensor, config: NewtonSchulzConfig) -> Tensor:
    """Compute the root (B, d, d) of the covariance of a map by operations that autograd can differentiate."""
    start = prenormalize(features_BdHW, config)
    steps = newton_schulz_steps(start.matrix, config.iterations)
    last = deque(steps, maxlen=1).pop()  # one step at a time is in memory
    return _root(start, last, config)


def isqrt_vector(features_BdHW: Tensor, triangle: Tensor, config: NewtonSchulzConfig) -> Tensor:
    """Compute the upper triangle (B, d (d + 1) / 2) of `covariance_root`."""
    return covariance_root(features_BdHW, config).flatten(start_dim=1).index_select(1, triangle)


def _root(start: Prenormalized, last: Step, config: NewtonSchulzConfig) -> Tensor:
    """Compute the root (B, d, d) from the last step: Y_N, times sqrt(n) with compensation."""
    if not start.use_gram:
        y_Bdd = last.next_y()
        return y_Bdd * start.norm.sqrt() if config.compensate else y_Bdd
    # Y_N = X Z_N X^T / n, so with compensation the divisor is n / sqrt(n) = sqrt(n)
    divisor_B11 = start.norm.sqrt() if config.compensate else start.norm
    return start.x @ (last.next_z() / divisor_B11) @ start.x.transpose(1, 2)


class ISqrtVector(torch.autograd.Function):
    """`isqrt_vector` with a handwritten gradient that saves the map and 2N matrices."""

    @staticmethod
    def forward(
        ctx: Any, features_BdHW: Tensor, triangle: Tensor, config: NewtonSchulzConfig
    ) -> Tensor:
        """Compute the upper triangle (B, d (d + 1) / 2) of the root."""
        start = prenormalize(features_BdHW, config)

        # T_k and F_k of each step, which `newton_schulz_adjoint` reads; F is Z on G and Y on A.
        ts = []
        fs = []
        last: Step
        for step in newton_schulz_steps(start.matrix, config.iterations):
            ts.append(step.t)
            fs.append(step.z if start.use_gram else step.y)
            last = step

        root_Bdd = _root(start, last, config)
        vector = root_Bdd.flatten(start_dim=1).index_select(1, triangle)

        ctx.config = config
        ctx.use_gram = start.use_gram
        # F_0 is not saved: it is the identity on G and the matrix itself on A.
        ctx.save_for_backward(
            features_BdHW, triangle, vector, start.norm, start.matrix, *ts, *fs[1:]
        )
        return vector

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Compute the gradient (B, d, H, W) of the map; second derivatives go through autograd.

        The root is n^p Y_N if the iteration ran on A = X X^T / n, and n^p X Z_N X^T on G = X^T
        X / n. With compensation p is 1/2 on A and -1/2 on G, without it 0 and -1. R is the
        gradient of the root. Matrices with the suffix nn are those of A, d x d, or of G, M x M;
        F is Y on A and Z on G.
        """
        config: NewtonSchulzConfig = ctx.config
        features_BdHW, triangle, vector, norm_B11, matrix_Bnn, *factors = ctx.saved_tensors

        # Second derivatives: compute the root again, by operations that autograd knows.
        if torch.is_grad_enabled():
            again = isqrt_vector(features_BdHW, triangle, config)
            return (
                torch.autograd.grad(again, features_BdHW, grad, create_graph=True)[0],
                None,
                None,
            )

        # What `forward` saved, by step.
        ts = factors[: config.iterations]
        # F_0 is Z_0 = I (None) on G, and Y_0 = A on A.
        fs = [None if ctx.use_gram else matrix_Bnn, *factors[config.iterations :]]

        # The gradient of the whole root: each number of the triangle stands at two places of
        # it.
        channels = features_BdHW.shape[1]
        upper = grad.new_zeros(len(grad), channels * channels).index_add_(1, triangle, grad)
        upper_Bdd = upper.view(-1, channels, channels)
        root_grad_Bdd = (upper_Bdd + upper_Bdd.transpose(1, 2)).mul_(0.5)  # R, symmetric
        root_dot_grad_B11 = (grad * vector).sum(dim=1)[:, None, None]  # <root, R>

        # V = X sqrt(M), the centered map; not saved, because it is as large as the map
        centered_BdM = deviations(at_least_float32(features_BdHW))
        positions = centered_BdM.shape[2]
        if ctx.use_gram:  # Z_N has the gradient X^T R X n^p = V^T R V n^p / M
            power = -0.5 if config.compensate else -1.0
            scale_B11 = norm_B11.pow(power) / positions
            rv_BdM = root_grad_Bdd @ centered_BdM
            f_grad_Bnn = (centered_BdM.transpose(1, 2) @ rv_BdM) * scale_B11
        else:  # Y_N has the gradient R n^p; n^0 is left out
            power = 0.5 if config.compensate else 0.0
            f_grad_Bnn = root_grad_Bdd
            if config.compensate:
                f_grad_Bnn = root_grad_Bdd * norm_B11.sqrt()

        # Through the steps, then through the normalization, to the product of the map with
        # itself.
        matrix_grad_Bnn = newton_schulz_adjoint(f_grad_Bnn, ts, fs)
        # This is n times the gradient that n receives from n^p.
        norm_term_B11 = power * root_dot_grad_B11
        product_grad_Bnn = _prenorm_adjoint(
            matrix_grad_Bnn, matrix_Bnn, norm_B11, norm_term_B11, config
        )
        product_grad_Bnn *= 2.0 / positions  # the product is V V^T / M on A, V^T V / M on G

        # Through the product to the map. Centering changes nothing more: each row of V sums to 0,
        # and so does each row of this gradient.
        if ctx.use_gram:
            z_BMM = ts[-1] if fs[-1] is None else ts[-1] @ fs[-1]  # Z_N = T Z_(N-1)
            # Besides, V is a factor of the root, V Z_N V^T n^p / M. This gives it 2 R V Z_N n^p
            # / M.
            direct_gradient_BdM = rv_BdM @ (z_BMM * (2.0 * scale_B11))
            gradient_BdM = torch.baddbmm(direct_gradient_BdM, centered_BdM, product_grad_Bnn)
        else:
            gradient_BdM = product_grad_Bnn @ centered_BdM
        return gradient_BdM.view_as(features_BdHW).to(features_BdHW.dtype), None, None


def _prenorm_adjoint(
    matrix_grad_Bnn: Tensor,
    matrix_Bnn: Tensor,
    norm_B11: Tensor,
    norm_term_B11: Tensor,
    config: NewtonSchulzConfig,
) -> Tensor:
    """Compute the gradient of P, X X^T or X^T X, of which *matrix_Bnn* is A = P / norm.

    With D = *matrix_grad_Bnn*, the gradient of A, the gradient of P is the sum of

    - D / norm, for a constant norm, and
    - h dnorm / dP, where h is the gradient of the norm: -<D, A> / norm from the division, and
      *norm_term_B11* / norm from the root, which is multiplied by a power of the norm.

    That is (D + (*norm_term_B11* - <D, A>) dnorm / dP) / norm. A norm up to `SMALLEST_NORM` was
    replaced by this constant, so its h is 0. Modifies *matrix_grad_Bnn*.
    """
    # <D, A>, then h times the norm.
    through_matrix_B11 = (matrix_grad_Bnn * matrix_Bnn).sum(dim=(1, 2), keepdim=True)
    total_term_B11 = (norm_term_B11 - through_matrix_B11) * (norm_B11 > SMALLEST_NORM)

    if config.prenorm == "trace":  # dnorm / dP = I
        matrix_grad_Bnn.diagonal(dim1=1, dim2=2).add_(total_term_B11[:, :, 0])
    elif config.prenorm == "frobenius":  # dnorm / dP = P / norm = A
        matrix_grad_Bnn.addcmul_(matrix_Bnn, total_term_B11)
    else:
        assert_never(config.prenorm)

    return matrix_grad_Bnn / norm_B11
