"""From logits to the answer: the one truth for the HTTP server and for `sopdeploy predict`."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sopdeploy_service.schema import Classes, ClassProbability, Expert


def answer(
    logits: NDArray[np.float32],
    labels: Sequence[str],
    top_k: int,
    *,
    warnings: tuple[str, ...] = (),
    gates: NDArray[np.float32] | None = None,
) -> Classes:
    """Return the *top_k* most probable classes of *logits* (C,), best first.

    Equal logits keep the order of *labels*; a *top_k* above C gives all C classes. *gates* (N,)
    are the weights of a gate's experts, where they belong into the answer.
    """
    best = np.argsort(-logits, kind="stable")[:top_k]
    probabilities = softmax(logits)[best]
    return Classes(
        classes=tuple(
            ClassProbability(label=labels[place], probability=float(probability))
            for place, probability in zip(best, probabilities, strict=True)
        ),
        warnings=warnings,
        gates=None if gates is None else experts(gates),
    )


def experts(gates: NDArray[np.float32]) -> tuple[Expert, ...]:
    """Return the experts whose weight in *gates* (N,) is not 0, best first; equal ones in their order."""
    best = np.argsort(-gates, kind="stable")
    return tuple(Expert(expert=int(place), weight=float(gates[place])) for place in best if gates[place] != 0)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the probabilities (C,) float64 of finite *logits* (C,), without overflow."""
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max())
    probabilities: NDArray[np.float64] = powers / powers.sum()
    return probabilities
