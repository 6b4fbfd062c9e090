"""The order in which kept photographs get labels: those that change the next network most come first."""

import numpy as np
from numpy.typing import NDArray

MAX_SPREAD = 500  # photographs of a group that are chosen one by one; a session labels fewer


def order_by_value(probabilities_NC: NDArray[np.float64], known_N: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Order N photographs by their *probabilities_NC* (N, C), (N,): uncertain and different ones first.

    Photographs that are probably of none of the classes follow the *known_N* (N,), because most of them show
    nothing that the network has to learn. In each group, the next one has the largest product of uncertainty,
    1 minus the margin between its two largest probabilities (Scheffer et al., IDA 2001), and distance from
    those chosen before, in the space of probabilities (k-center: Sener and Savarese, ICLR 2018). After
    `MAX_SPREAD`, the uncertainty decides alone.
    """
    largest = np.sort(np.pad(probabilities_NC, ((0, 0), (2, 0))), axis=1)[:, -2:]
    uncertainties_N = 1 - (largest[:, 1] - largest[:, 0])
    order: list[int] = []
    for group in (np.flatnonzero(known_N), np.flatnonzero(~known_N)):
        left = group[np.argsort(-uncertainties_N[group], kind="stable")]
        distances = np.ones(len(left))
        for _ in range(min(MAX_SPREAD, len(left))):
            best = int((distances * uncertainties_N[left]).argmax())
            step = np.linalg.norm(probabilities_NC[left] - probabilities_NC[left[best]], axis=1)
            order.append(int(left[best]))
            left, distances = np.delete(left, best), np.delete(np.minimum(distances, step), best)
        order += left.tolist()
    return np.asarray(order, np.intp)
