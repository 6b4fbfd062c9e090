"""From classes to the answer: the one truth for the HTTP server and for `sopdeploy predict`.

Plain dictionaries of the shape that `schema` describes: to build and check models of it would cost CPU at
every request and find nothing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy_service.ranking import Ranked, best


def answer(
    ranked: Ranked,
    labels: Sequence[str],
    *,
    warnings: tuple[str, ...] = (),
    gates: NDArray[np.float32] | None = None,
) -> dict[str, Any]:
    """Return a `schema.Classes` as JSON has it: the classes of *ranked*, places in *labels*.

    *gates* (N,) are the weights of a gate's experts, where they belong into the answer.
    """
    found: dict[str, Any] = {
        "classes": [{"label": labels[place], "probability": probability} for place, probability in ranked],
        "warnings": warnings,
    }
    return found if gates is None else {**found, "gates": experts(gates)}


def experts(gates: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Return the experts whose weight in *gates* (N,) is not 0, best first; equal ones in their order."""
    return [
        {"expert": place, "weight": float(gates[place])}
        for place in best(gates, len(gates)).tolist()
        if gates[place] != 0
    ]
