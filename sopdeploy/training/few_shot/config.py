"""Recipe table `[few_shot]`, and the record of what the procedure found."""

from typing import Annotated

import pydantic

from sopdeploy.config import Count, Fraction, NonNegative, Positive, StrictModel
from sopdeploy.decision import Estimate
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.layers.pooling.registry import Pooling

FEATURES_FILE = "features.pt"  # in the run folder
Folds = Annotated[int, pydantic.Field(ge=2, le=20)]


class FineTuningConfig(StrictModel):
    """Fine-tuning of the last stage and what follows it, from cached inputs of that stage.

    Attributes:
        epochs: Upper limit of the epochs; 0 disables fine-tuning.
        folds: Folds of its cross-validation; each of them trains one network.
        patience: Epochs without a better cross-validated loss after which it stops.
        lr: Learning rate of AdamW for the classifier and the last block.
        decay: Factor on the learning rate for each block further from the classifier.
        batch_size: Images of a step.
        max_gib: Largest size in GiB of the cached inputs; with more, only the head is fitted.
    """

    epochs: Annotated[int, pydantic.Field(ge=0)] = 15
    folds: Folds = 3
    patience: Count = 3
    lr: Positive = 2e-4
    decay: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.5
    batch_size: Count = 16
    max_gib: Positive = 1.0


class FewShotConfig(StrictModel):
    """Training for few images: a regularized head on frozen features, then fine-tuning if it helps.

    Attributes:
        max_images: With more training images the ordinary training loop runs.
        min_held_out: With fewer images selected for the held-out set, cross-validation on all images replaces
            it. A `val/` folder is always used.
        folds: Folds of the cross-validation of the head, at most the images of the smallest class.
        heads: Global poolings to compare; empty is the pooling of the network.
        balance_above: Ratio of the largest class to the smallest above which classes get equal weights.
        fine_tuning: The second step.
    """

    max_images: Count = 1000
    min_held_out: Count = 100
    folds: Folds = 5
    heads: tuple[Pooling, ...] = ()
    balance_above: Annotated[float, pydantic.Field(ge=1)] = 1.5
    fine_tuning: FineTuningConfig = FineTuningConfig()


class HeadResult(StrictModel):
    """Cross-validated accuracy and loss of a linear head; `l2` is the regularization that was chosen."""

    pooling: str
    features: Count
    top1: Fraction
    loss: NonNegative
    l2: Positive


class FineTuningResult(StrictModel):
    """Cross-validated figures on equal folds before and after fine-tuning, and the decision.

    `epochs` is the number that was chosen. The figures are `None` if fine-tuning was not tried.
    """

    kept: bool
    reason: str
    epochs: int = 0
    top1_before: Fraction | None = None
    top1_after: Fraction | None = None
    loss_before: NonNegative | None = None
    loss_after: NonNegative | None = None


class FewShotResult(StrictModel):
    """What the procedure found.

    Attributes:
        top1: Accuracy with its 95 % interval (Wilson).
        estimated_on: Origin of `top1`: the held-out images or cross-validation.
        class_counts: Training images of each class.
        balanced: Whether classes had equal weights in the loss.
        duplicates: Training images with the same pixels as an earlier one; they share its fold.
        heads: The heads that were compared; the chosen one is first.
        fine_tuning: Decision on the second step.
        seconds: Time of each step.
    """

    top1: Rate
    estimated_on: Estimate
    class_counts: dict[str, int]
    balanced: bool
    duplicates: int
    heads: tuple[HeadResult, ...]
    fine_tuning: FineTuningResult
    seconds: dict[str, float]

    def lines(self) -> tuple[str, ...]:
        """Describe the result for people, the accuracy last."""
        counts = ", ".join(f"{label} {count}" for label, count in self.class_counts.items())
        counts += "; classes have equal weights" if self.balanced else ""
        counts += f"; {self.duplicates} duplicates" if self.duplicates else ""
        heads = "; ".join(
            f"{head.pooling} {100 * head.top1:.1f} %, loss {head.loss:.3f}, l2 {head.l2:.1g}"
            for head in self.heads
        )
        tuning, rate, change = self.fine_tuning, self.top1, ""
        if tuning.top1_before is not None and tuning.top1_after is not None:
            change = (
                f" (top-1 {100 * tuning.top1_before:.1f} % before, {100 * tuning.top1_after:.1f} % after "
                f"{tuning.epochs} epochs; loss {tuning.loss_before:.3f}, {tuning.loss_after:.3f})"
            )
        origin = "cross-validated" if self.estimated_on == "cross-validation" else "held out"
        return (
            f"images: {counts}",
            f"heads: {heads}",
            f"fine-tuning: {'kept' if tuning.kept else 'not kept'}, {tuning.reason}{change}",
            f"top-1 {100 * rate.share:.1f} % ({origin}, 95 % interval {100 * rate.low:.0f} to "
            f"{100 * rate.high:.0f} %) of {rate.count} images, {sum(self.seconds.values()):.0f} s",
        )
