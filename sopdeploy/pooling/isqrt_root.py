"""The root that iSQRT-COV pools, as a function of the feature map, over channels or over positions.

Paper: iSQRT-COV, section 3. Letters: B images, d channels, M positions, N iterations; X is the map,
centred and divided by sqrt(M).

Every iterate is a polynomial in A = X X^T / n, so the N steps may as well run on the M x M Gram matrix
G = X^T X / n: with Z_N the other iterate of Newton-Schulz on G, Y_N(A) = X Z_N(G) X^T / n. This is the
same polynomial, not an approximation, and where M < d it takes fewer products: 7 x 7 and 14 x 14 maps
of 256 channels, 8 x 8 maps of 128. It is computed in float32 at least: in half precision the Gram
form finds negative eigenvalues where there are none.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sopdeploy.pooling.covariance import centred_positions, covariance, covariance_trace, frobenius_norm
from sopdeploy.pooling.newton_schulz import Step, last_step
from sopdeploy.pooling.precision import at_least_float32

SMALLEST_NORM = 1e-12  # a constant map has norm 0; its answer is then 0, with finite gradients


class Rule(NamedTuple):
    """The switches of `ISqrtCovConfig` that the root depends on.

    `stored` is the type of the matrices between two products; an exporter may choose float16. It says how
    float32 is rounded: a run in float64, the reference, stores float64.
    """

    iterations: int
    prenorm: Literal["trace", "frobenius"]
    compensate: bool
    stored: Literal["float32", "float16"] = "float32"


class Normalised(NamedTuple):
    """X as (B, d, M), its norm n as (B, 1, 1), and the matrix that the iteration takes.

    That is A (B, d, d), or G (B, M, M) where `by_positions`.
    """

    x: Tensor
    norm: Tensor
    matrix: Tensor
    by_positions: bool


def positions_are_cheaper(channels: int, positions: int, iterations: int) -> bool:
    """Return whether the iteration on G takes fewer multiply-adds than that on A.

    For N = 5 this says M < 0.95 d. Shapes that are not known beforehand stay with the channels.
    """
    if type(positions) is not int or type(channels) is not int:
        return False
    products = max(1, 3 * iterations - 3)
    by_channels = products * channels**3
    return products * positions**3 + 2 * channels * positions**2 < by_channels


def normalise(features_BdHW: Tensor, rule: Rule) -> Normalised:
    """Return what the iteration starts from: centred, multiplied, divided by trace or Frobenius norm.

    Both have the same trace and the same Frobenius norm, whichever way round the product is.
    """
    x_BdM = centred_positions(at_least_float32(features_BdHW))
    by_positions = positions_are_cheaper(x_BdM.shape[1], x_BdM.shape[2], rule.iterations)
    by_positions = by_positions and rule.stored == "float32"
    matrix_Bnn = covariance(x_BdM.transpose(1, 2) if by_positions else x_BdM)
    norm_B11 = covariance_trace(matrix_Bnn) if rule.prenorm == "trace" else frobenius_norm(matrix_Bnn)
    norm_B11 = norm_B11.clamp_min(SMALLEST_NORM)
    return Normalised(x_BdM, norm_B11, matrix_Bnn / norm_B11, by_positions)


def finish(start: Normalised, last: Step, rule: Rule) -> Tensor:
    """Return the root (B, d, d) from the last step: Y_N, times sqrt(n) with compensation."""
    if start.by_positions:
        return start.x @ inner_root(start, last, rule) @ start.x.transpose(1, 2)
    y_Bdd = at_least_float32(last.next_y())
    return y_Bdd * start.norm.sqrt() if rule.compensate else y_Bdd


def inner_root(start: Normalised, last: Step, rule: Rule) -> Tensor:
    """Return P (B, M, M) of the root X P X^T: Z_N / n, times sqrt(n) with compensation."""
    return last.next_z() / (start.norm.sqrt() if rule.compensate else start.norm)


def covariance_root(features_BdHW: Tensor, rule: Rule) -> Tensor:
    """Return the root (B, d, d) of the covariance of a map, to be differentiated by autograd."""
    start = normalise(features_BdHW, rule)
    return finish(start, last_step(as_stored(start.matrix, rule), rule.iterations), rule)


def as_stored(matrix_Bnn: Tensor, rule: Rule) -> Tensor:
    """Return a float32 matrix in the type that *rule* stores it in between two products."""
    return matrix_Bnn.half() if rule.stored == "float16" and matrix_Bnn.dtype == torch.float32 else matrix_Bnn
