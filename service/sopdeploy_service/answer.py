"""From logits to the answer: the one truth for the HTTP server and for `sopdeploy predict`.

Plain dictionaries of the shape that `schema` describes: to build and check models of it would cost CPU at
every request and find nothing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FEW = 10  # up to so many are looked for one by one


def answer(
    logits: NDArray[np.float32],
    labels: Sequence[str],
    top_k: int,
    *,
    warnings: tuple[str, ...] = (),
    gates: NDArray[np.float32] | None = None,
) -> dict[str, Any]:
    """Return a `schema.Classes` as JSON has it: the *top_k* most probable of *logits* (C,), best first.

    Equal logits keep the order of *labels*; a *top_k* above C gives all C classes. *gates* (N,)
    are the weights of a gate's experts, where they belong into the answer.
    """
    places = best(logits, top_k)
    found: dict[str, Any] = {
        "classes": [
            {"label": labels[place], "probability": probability}
            for place, probability in zip(places, softmax(logits)[places].tolist(), strict=True)
        ],
        "warnings": list(warnings),
    }
    return found if gates is None else {**found, "gates": experts(gates)}


def best(values: NDArray[np.float32], count: int) -> list[int]:
    """Return the places of the *count* largest of finite *values* (C,), best first, equal ones in order.

    The rest is not sorted.
    """
    if count <= FEW:
        left = values.copy()
        found = []
        for _ in range(min(count, len(values))):
            found.append(int(left.argmax()))
            left[found[-1]] = -np.inf
        return found
    if count >= len(values):
        return [int(place) for place in np.argsort(-values, kind="stable")]
    least = np.partition(values, -count)[-count]
    places = np.flatnonzero(values >= least)  # more than *count* where several are equal to the least
    return [int(place) for place in places[np.argsort(-values[places], kind="stable")[:count]]]


def experts(gates: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Return the experts whose weight in *gates* (N,) is not 0, best first; equal ones in their order."""
    return [
        {"expert": place, "weight": float(gates[place])}
        for place in best(gates, len(gates))
        if gates[place] != 0
    ]


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the probabilities (C,) float64 of finite *logits* (C,), without overflow."""
    powers = logits.astype(np.float64)
    powers -= powers.max()
    np.exp(powers, out=powers)
    powers /= powers.sum()
    return powers
