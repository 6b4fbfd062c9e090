"""Recipe table `[few_shot]`, and the record of the procedure's results."""

from typing import Annotated, Any

import pydantic

from sopdeploy.config import Count, Fraction, NonNegative, Positive, PositiveRate, StrictModel
from sopdeploy.decision import Estimate, Score
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.layers.pooling.registry import Pooling

FEATURES_FILE = "features.pt"  # in the run folder
FEW_IMAGES = 5  # the result names classes with fewer images, because each fold tests hardly any of them
Folds = Annotated[int, pydantic.Field(ge=2, le=20)]


class FineTuningConfig(StrictModel):
    """Fine-tuning of the last stage and what follows it, from cached inputs of that stage.

    Attributes:
        epochs: Upper limit of the epochs; 0 disables fine-tuning.
        folds: Folds of its cross-validation; one network is trained per fold.
        patience: Number of epochs without a smaller cross-validated loss after which training stops.
        lr: Learning rate of AdamW for the classifier and the last block.
        decay: Factor on the learning rate for each block further from the classifier.
        batch_size: Images of a step.
        max_gib: Largest size in GiB of the cached inputs; with more, only the head is fitted.
        branches: Whether to try the branches of DSoP that read the last stage, too.
        gsop: Whether to try a GSoP block at the end of the last stage, too.
    """

    epochs: Annotated[int, pydantic.Field(ge=0)] = 15
    folds: Folds = 3
    patience: Count = 3
    lr: PositiveRate = 2e-4
    decay: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.5
    batch_size: Count = 16
    max_gib: Positive = 1.0
    branches: bool = True
    gsop: bool = True


class FewShotConfig(StrictModel):
    """Training for few images: a regularized head on frozen features, then fine-tuning if it helps.

    Attributes:
        max_images: With more training images the ordinary training loop runs.
        min_held_out: If fewer images were split off as the held-out set, cross-validation on all images
            replaces it. A `val/` folder is always used.
        folds: Folds of the cross-validation of the head, at most the number of images of the smallest class.
        heads: Global poolings to compare; the first one is kept unless another one is better. If empty: the
            pooling of the network and, if that is average pooling, iSQRT-COV.
        balance_above: Ratio of the largest class to the smallest above which classes get equal weights.
        fine_tuning: Options of the second step.
    """

    max_images: Count = 1000
    min_held_out: Count = 100
    folds: Folds = 5
    heads: tuple[Pooling, ...] = ()
    balance_above: Annotated[float, pydantic.Field(ge=1)] = 1.5
    fine_tuning: FineTuningConfig = FineTuningConfig()


class MeanPrecision(StrictModel):
    """Mean average precision `share` over `count` images with a 95 % interval [`low`, `high`]."""

    share: Fraction
    count: int
    low: Fraction
    high: Fraction


class CandidateResult(StrictModel):
    """One way to train the network, its cross-validated score, and whether it was chosen.

    Attributes:
        name: What is trained.
        kept: Whether the candidate was chosen; fine-tuning starts from the chosen head.
        reason: Why it was chosen or not, compared with the first head or with the chosen head alone.
        score: Accuracy, or mAP with several classes per image; `None` if the candidate was not tried.
        loss: Mean weighted loss.
        score_before: Score of the chosen head alone on the same folds; for fine-tuning only.
        loss_before: Loss of the chosen head alone on the same folds; for fine-tuning only.
        features: Length of the vector that the classifier reads.
        l2: The chosen regularization; for heads only.
        epochs: The chosen number of epochs; for fine-tuning only.
    """

    name: str
    kept: bool
    reason: str
    score: Rate | MeanPrecision | None = None
    loss: NonNegative | None = None
    score_before: Fraction | None = None
    loss_before: NonNegative | None = None
    features: Count | None = None
    l2: Positive | None = None
    epochs: int | None = None

    def line(self) -> str:
        """Describe the candidate in one line for the terminal and the report."""
        decision = f"{self.name}: {'kept' if self.kept else 'not kept'}, {self.reason}"
        if self.score is None:
            return decision
        score, name = self.score, "top-1" if isinstance(self.score, Rate) else "mAP"
        interval = f"{100 * score.low:.0f} to {100 * score.high:.0f} %"
        figures = [f"{name} {100 * score.share:.1f} %, {interval}; loss {self.loss:.3f}"]
        if self.l2 is not None:
            figures.append(f"{self.features} features, l2 {self.l2:.1g}")
        if self.score_before is not None:
            figures.append(f"before {100 * self.score_before:.1f} %, loss {self.loss_before:.3f}")
            figures.append(f"{self.epochs} epochs")
        return f"{decision} ({'; '.join(figures)})"


class FewShotResult(StrictModel):
    """Result of the few-shot procedure.

    Attributes:
        top1: Accuracy with its 95 % interval (Wilson); `None` with several classes per image.
        map: Mean average precision with its interval; only with several classes per image.
        estimated_on: Origin of `top1` or `map`: the held-out images or cross-validation.
        class_counts: Training images of each class.
        balanced: Whether classes had equal weights in the loss.
        duplicates: Training images with the same pixels as an earlier one; they share its fold.
        candidates: The heads, then the ways of fine-tuning.
        auroc: AUROC of the scores for unknown images, by heads fitted without one class at a time.
        seconds: Time of each step.
    """

    top1: Rate | None = None
    map: MeanPrecision | None = None
    estimated_on: Estimate
    class_counts: dict[str, int]
    balanced: bool
    duplicates: int
    candidates: tuple[CandidateResult, ...]
    auroc: dict[Score, Fraction] = pydantic.Field(default_factory=dict)
    seconds: dict[str, float]

    @pydantic.model_validator(mode="before")
    @classmethod
    def _convert_first_records(cls, values: Any) -> Any:
        """Convert `heads` and `fine_tuning` of records that older versions wrote."""
        if not isinstance(values, dict) or "heads" not in values:
            return values
        values, count = dict(values), values["top1"]["count"]
        tuning, found = values.pop("fine_tuning"), []
        for number, head in enumerate(values.pop("heads")):
            one = {key: head[key] for key in ("loss", "features", "l2")}
            one |= {"name": f"{head['pooling']} head", "kept": number == 0}
            one["reason"] = "smallest loss" if number == 0 else "the loss is not smaller"
            one["score"] = Rate.of(round(head["top1"] * count), count).model_dump()
            found.append(one)
        last = {key: tuning[key] for key in ("kept", "reason", "epochs", "loss_before")}
        if tuning["top1_after"] is not None:
            last |= {"score_before": tuning["top1_before"], "loss": tuning["loss_after"]}
            last["score"] = Rate.of(round(tuning["top1_after"] * count), count).model_dump()
        return {**values, "candidates": (*found, {"name": "fine-tuning", **last})}

    @property
    def score(self) -> Rate | MeanPrecision:
        """The accuracy, or the mAP."""
        score = self.top1 or self.map
        assert score is not None  # noqa: S101  # one of the two is set
        return score

    def lines(self) -> tuple[str, ...]:
        """Describe the result in lines for the terminal and the report: images, candidates, score."""
        seconds = sum(self.seconds.values())
        return (
            f"images: {self.describe_images()}",
            *(candidate.line() for candidate in self.candidates),
            f"{self.describe_score()}, {seconds:.0f} s",
        )

    def describe_score(self) -> str:
        """Describe the score; if it is not clearly better, add the accuracy of always guessing one class."""
        score, name = self.score, "top-1" if self.map is None else "mAP"
        origin = "cross-validated" if self.estimated_on == "cross-validation" else "held out"
        label = max(self.class_counts, key=self.class_counts.__getitem__)
        share = self.class_counts[label] / max(1, sum(self.class_counts.values()))
        guess = ""
        if self.map is None and score.low <= share:
            guess = f'; always answering "{label}" gives {100 * share:.0f} %'
        return (
            f"{name} {100 * score.share:.1f} % ({origin}, 95 % interval {100 * score.low:.0f} to "
            f"{100 * score.high:.0f} %{guess}) of {score.count} images"
        )

    def describe_images(self) -> str:
        """Describe the training images: their classes, imbalance, and duplicates."""
        counts = self.class_counts
        text = ", ".join(f"{label} {count}" for label, count in counts.items())
        if self.balanced:
            ratio = max(counts.values()) / max(1, min(counts.values()))
            text += (
                f"; classes have equal weights, the largest has {ratio:.1f} times the images of the smallest"
            )
        few = [label for label, count in counts.items() if count < FEW_IMAGES]
        if few:
            text += f"; fewer than {FEW_IMAGES} images of {', '.join(few)}: add more"
        if self.duplicates:
            text += f"; {self.duplicates} duplicate{'s' * (self.duplicates > 1)}"
        return text
