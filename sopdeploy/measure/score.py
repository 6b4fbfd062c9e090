"""How one picture was answered: all that the figures need of it, whatever gave the answer."""

from collections.abc import Sequence
from dataclasses import dataclass

FIRST = 5  # answers that are kept of each picture


@dataclass(frozen=True, slots=True)
class Score:
    """Classes by their place among the sorted names.

    `answers` are the first five, best first; `confidence` is the probability of the first, `likelihood` that
    of the picture's own class, `target`.
    """

    target: int
    answers: tuple[int, ...]
    confidence: float
    likelihood: float

    @property
    def right(self) -> bool:
        """Say whether the first answer is the picture's class."""
        return self.answers[0] == self.target


def score(target: int, ranked: Sequence[tuple[int, float]]) -> Score:
    """Return the score of a picture of class *target*, of all classes *ranked* with their probabilities."""
    return Score(
        target=target,
        answers=tuple(place for place, _ in ranked[:FIRST]),
        confidence=ranked[0][1],
        likelihood=next(probability for place, probability in ranked if place == target),
    )
