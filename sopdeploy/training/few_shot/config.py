"""Recipe table `[procedure]` of the few-shot procedure, and its result."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

import pydantic

from sopdeploy.config import Count, Fraction, NonNegative, Positive, StrictModel
from sopdeploy.decision import Estimate, Score
from sopdeploy.errors import shorten
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import MeanPrecision
from sopdeploy.models.second_order_head import HeadKind
from sopdeploy.training.loop_config import LOOP_KEYS
from sopdeploy.training.procedure_config import ProcedureConfig, ProcedureResult

_FEW_IMAGES = 5  # the result names classes with fewer images, because each fold tests hardly any of them


class CandidateResult(StrictModel):
    """A network with one head, its cross-validated `score` (accuracy or mAP) and mean weighted `loss`.

    Attributes:
        name: The network, and the statistics that the classifier reads.
        kept: Whether the candidate was chosen.
        num_features: Length of the vector that the classifier reads.
        strength: The chosen inverse strength of the regularization, scikit-learn's C.
        seconds: Time of its cross-validation.
    """

    name: str
    kept: bool = False
    score: Rate | MeanPrecision
    loss: NonNegative
    num_features: Count
    strength: Positive
    seconds: NonNegative

    def line(self) -> str:
        """Describe the candidate in one line for the terminal and the report."""
        score, name = self.score, "top-1" if isinstance(self.score, Rate) else "mAP"
        return (
            f"{self.name}: {name} {100 * score.value:.1f} % ({100 * score.low:.0f} to {100 * score.high:.0f} "
            f"%), loss {self.loss:.3f}, {self.num_features:,} features, C {self.strength:g}"
            f"{' - chosen' * self.kept}"
        )


class FewShotResult(ProcedureResult):
    """Result of the few-shot procedure.

    Attributes:
        top1: Accuracy with its 95 % interval (`estimates.estimate`); `None` with several classes per image.
        map: Mean average precision with its interval; only with several classes per image.
        estimated_on: Origin of `top1` or `map`: the held-out images or cross-validation.
        class_counts: Training images of each class; the network is fitted to all of them.
        balanced: Whether classes had equal weights in the loss.
        num_duplicates: Training images with the same pixels as an earlier one; they share its fold.
        num_groups: Number of groups of training images: different photographs, each with its copies.
        one_group: Classes whose images are one group, so that a fold holds all of them.
        contradictions: Files of groups with different labels, joined by " = ".
        candidates: What was tried.
        choice: Why the candidate was chosen.
        auroc: AUROC of the scores for unknown images, by heads fitted without one class at a time.
        unknown: Why no threshold for unknown images was fitted; empty if there is one.
        seconds: Time of each step.
    """

    kind: Literal["few_shot"] = "few_shot"
    top1: Rate | None = None
    map: MeanPrecision | None = None
    estimated_on: Estimate
    class_counts: dict[str, int]
    balanced: bool
    num_duplicates: int
    num_groups: int
    one_group: tuple[str, ...] = ()
    contradictions: tuple[str, ...] = ()
    candidates: tuple[CandidateResult, ...]
    choice: str
    auroc: dict[Score, Fraction] = pydantic.Field(default_factory=dict)
    unknown: str = ""
    seconds: dict[str, float]

    @property
    def score(self) -> Rate | MeanPrecision:
        """The accuracy, or the mAP."""
        return self.top1 or self.map  # type: ignore[return-value]  # one of the two is set

    @property
    def score_name(self) -> str:
        """The name of the score."""
        return "top-1" if self.map is None else "mAP"

    def rows(self) -> list[tuple[str, str]]:
        """Describe the training images and the score."""
        return [("images", self.describe_images()), ("accuracy", self.describe_score())]

    def lines(self) -> tuple[str, ...]:
        """Describe images, candidates, choice, score and time."""
        lines = [f"images: {self.describe_images()}", *self.describe_groups()]
        lines += [candidate.line() for candidate in self.candidates]
        lines.append(f"chosen: {self.choice}")
        if self.unknown:
            lines.append(f"unknown images: {self.unknown}")
        steps = ", ".join(f"{name} {value:.0f} s" for name, value in self.seconds.items())
        return (*lines, f"{self.describe_score()}; {steps}")

    def describe_score(self) -> str:
        """Describe the score; if it is not clearly better, add the accuracy of always guessing one class."""
        score = self.score
        origin = "cross-validated" if self.estimated_on == "cross-validation" else "held out"
        label, largest = max(self.class_counts.items(), key=lambda count: count[1])
        majority, comparison = largest / max(1, sum(self.class_counts.values())), ""
        if self.map is None and score.low <= majority:
            comparison = f'; always answering "{label}" gives {100 * majority:.0f} %'
        return (
            f"{self.score_name} {100 * score.value:.1f} % ({origin}, 95 % interval {100 * score.low:.0f} to "
            f"{100 * score.high:.0f} %{comparison}) of {score.count} images"
        )

    def describe_groups(self) -> Iterator[str]:
        """Describe the copies among the training images, and what they make impossible."""
        count = self.candidates[0].score.count if self.candidates else self.num_groups
        if self.num_groups < count:
            yield f"{count} photographs, {self.num_groups} different ones: copies are kept in the same fold"
        if self.one_group:
            yield (
                f"all images of {shorten(self.one_group)} are one group (copies of one photograph, or one "
                "folder), so the accuracy of the class cannot be estimated; add different photographs"
            )
        if self.contradictions:
            yield f"copies with different labels, correct or delete one: {shorten(self.contradictions, '; ')}"

    def describe_images(self) -> str:
        """Describe the training images: their classes, imbalance, and duplicates."""
        counts = self.class_counts
        text = ", ".join(f"{label} {count}" for label, count in counts.items())
        if self.balanced:
            ratio = max(counts.values()) / max(1, min(counts.values()))
            text += f"; classes have equal weights, the largest is {ratio:.1f} times the smallest"
        few = [label for label, count in counts.items() if count < _FEW_IMAGES]
        if few:
            text += f"; fewer than {_FEW_IMAGES} images of {', '.join(few)}: add more"
        if self.num_duplicates:
            text += f"; {self.num_duplicates} duplicate{'s' * (self.num_duplicates > 1)}"
        return text


class FewShotConfig(ProcedureConfig):
    """Training for few images: cross-validation chooses a linear classifier on features of a frozen network.

    Attributes:
        folds: Folds of the cross-validation, at most the number of different images.
        group_copies: Whether near-duplicates share a fold; exact duplicates and given groups always do.
        heads: Heads to compare; the first one is kept unless another one is better. If empty: "gap+isqrt" of
            the last two feature maps and of the last one, and "gap".
        models: Further networks to compare with `model.name`, as NAME or NAME=FILE with a file of weights.
            Without a file they start from `start.weights`.
    """

    implementation: ClassVar[str] = "sopdeploy.training.few_shot.run:FewShot"
    result: ClassVar[type[FewShotResult]] = FewShotResult
    unread: ClassVar[tuple[str, ...]] = LOOP_KEYS
    kind: Literal["few_shot"] = "few_shot"
    folds: Annotated[int, pydantic.Field(ge=2, le=20)] = 10
    group_copies: bool = True
    heads: tuple[HeadKind, ...] = ()
    models: tuple[str, ...] = ()
