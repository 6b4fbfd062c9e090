"""The order in which kept photographs get labels: those that change the next network most come first."""

import numpy as np
from numpy.typing import NDArray

MAX_DRAWN = 500  # photographs that are drawn one by one; a session labels fewer


def order_by_value(probabilities_NC: NDArray[np.float64], known_N: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Order N photographs by their *probabilities_NC* (N, C), (N,): uncertain and different ones first.

    This is BADGE (Ash et al., ICLR 2020, algorithm 1) with the gradient of the loss of the most probable
    class with respect to the logits: long for uncertain predictions, and similar for similar ones.
    Photographs that are probably of none of the classes follow the *known_N* (N,), because most of them show
    nothing that the network has to learn. After `MAX_DRAWN` of a group, the length decides alone.
    """
    gradients_NC = probabilities_NC.copy()
    if gradients_NC.size:
        gradients_NC[np.arange(len(gradients_NC)), gradients_NC.argmax(axis=1)] -= 1
    lengths_N, order = np.linalg.norm(gradients_NC, axis=1), list[int]()
    for group in (np.flatnonzero(known_N), np.flatnonzero(~known_N)):
        by_length = group[np.argsort(-lengths_N[group], kind="stable")]
        drawn = _spread(gradients_NC[by_length])
        order += [*by_length[drawn].tolist(), *np.delete(by_length, drawn).tolist()]
    return np.asarray(order, np.intp)


def _spread(points_NC: NDArray[np.float64]) -> list[int]:
    """Draw up to `MAX_DRAWN` different points by k-means++, beginning with the first; return their indices.

    The probability of a point is proportional to its squared distance from the nearest one that is drawn.
    """
    random, drawn = np.random.default_rng(0), list[int]()
    distances_N = np.full(len(points_NC), np.inf)
    place = 0
    while len(drawn) < min(MAX_DRAWN, len(points_NC)):
        drawn.append(place)
        squares_N = np.square(points_NC - points_NC[place]).sum(axis=1)
        distances_N = np.minimum(distances_N, squares_N)
        distances_N[drawn] = 0
        total = distances_N.sum()
        if total == 0:  # the rest equals those that are drawn
            break
        place = int(random.choice(len(points_NC), p=distances_N / total))
    return drawn
