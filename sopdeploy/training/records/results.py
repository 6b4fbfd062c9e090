"""The result of the loop and of the few-shot procedure, part of `best.pt`, and all sentences about it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.base.config import (
    Count,
    Fraction,
    Positive,
    StrictModel,
    version_advice,
    writer_of,
)
from sopdeploy.bundle.decision import Estimate
from sopdeploy.data.photos.clips import describe_clip, describe_possible_clip
from sopdeploy.data.photos.file_checks import describe_left_out
from sopdeploy.errors import CheckpointError, amount, shorten
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import MeanPrecision
from sopdeploy.evaluation.statistics import (
    TESTABLE,
    TOLERANCE,
    Verdict,
    decide,
    mcnemar,
    smallest_difference,
)

# The result names classes with fewer images, because each fold tests hardly any of them
_FEW_IMAGES = 5
# With the folders of a run, `insert_folders` makes it a command
LIST_WRONG_LABELS = "sopdeploy train --data DIR --dry-run --wrong-labels RUN"
SelectedBy = Literal["nothing", "other images", "same images"]


def insert_folders(text: str, data: Path | None, run: Path) -> str:
    """Insert the folders of the *data*, if there is one, and of the *run* into commands in *text*."""
    folder = "DIR" if data is None else str(data)
    command = (
        f"sopdeploy train --data {quote(folder)} --dry-run --wrong-labels {quote(str(run))}"
    )
    return text.replace(LIST_WRONG_LABELS, command)


def _interval(score: Rate | MeanPrecision) -> str:
    return f"{100 * score.low:.0f} to {100 * score.high:.0f}"


class Tuning(StrictModel):
    """The fine-tuned network compared with the frozen one on `count` different held-out photographs.

    `first` and `second` are the numbers that the frozen and the fine-tuned network classify
    correctly, `wins` and `losses` those on which only the second or only the first is right.
    With fewer than `TESTABLE` photographs nothing was trained, and these are 0.
    """

    count: int
    first: int = 0
    second: int = 0
    wins: int = 0
    losses: int = 0

    @classmethod
    def of(cls, first: NDArray[np.bool_], second: NDArray[np.bool_]) -> "Tuning":
        """Count the photographs (N,) that the frozen and the fine-tuned network classify correctly."""
        wins = int((second & ~first).sum())
        losses = int((first & ~second).sum())

        return cls(
            count=len(first),
            first=int(first.sum()),
            second=int(second.sum()),
            wins=wins,
            losses=losses,
        )

    @property
    def is_better(self) -> bool:
        """Whether the fine-tuned network is better by the rule of `sopdeploy compare`."""
        return self.count >= TESTABLE and self.verdict == "better"

    @property
    def verdict(self) -> Verdict:
        """The verdict of the comparison of the fine-tuned network with the frozen one."""
        return decide(self.wins, self.losses, self.count, TOLERANCE)

    def describe(self) -> str:
        """Say in one line which network is kept, and by which photographs."""
        kept = "the frozen network is kept"
        if self.count < TESTABLE:
            few = (
                f"{amount(self.count, 'validation image')}, too few to decide, "
                f"give at least {TESTABLE}"
            )
            return f"fine-tuning: {few}; {kept}"

        tuned, frozen = (
            f"{100 * right / self.count:.1f}" for right in (self.second, self.first)
        )
        figures = (
            f"fine-tuning: {tuned} % instead of {frozen} % of {self.count} "
            f"validation images, better on {self.wins}, worse on {self.losses}, "
            f"p {mcnemar(self.wins, self.losses):.2g}"
        )

        if self.is_better:
            return f"{figures}; the fine-tuned network is kept"
        if self.verdict == "worse":
            return f"{figures}; worse, so {kept}"
        smallest = 100 * smallest_difference(self.wins, self.losses, self.count)
        return (
            f"{figures}; too few to decide: they show differences from about "
            f"{smallest:.2g} points; {kept}"
        )


def _list_left_out(result: "AnyProcedureResult") -> list[str]:
    return [describe_left_out(result.left_out)] if result.left_out else []


class LoopResult(StrictModel):
    """Top-1 accuracy or mAP of the best of `num_epochs` epochs on `count` validation images.

    Attributes:
        epoch: The best epoch, from 1.
        top1: Accuracy with its 95 % interval; `None` with several classes per image.
        map: Mean average precision; only with several classes per image.
        selected_by: The images that select the measured epoch: none (`nothing`), `other images`, or the
            `same images`. The score is too high in the last case only.
        mirrored: Whether the mean logits of each image and its mirror image were scored.
        tuning: The comparison with the frozen network, if the loop started from it.
        left_out: The unusable images that the run left out, each with the reason.
        num_seen: Validation images that are also training images; the score is too high then.
        branches: The scores of the network ("main") and of each auxiliary branch in the best epoch, on
            `num_diagnosed` of the validation images; empty without branches.
    """

    kind: Literal["loop"] = "loop"
    epoch: int
    num_epochs: int
    top1: Rate | None = None
    map: Fraction | None = None
    count: int
    selected_by: SelectedBy
    mirrored: bool = False
    tuning: Tuning | None = None
    left_out: tuple[str, ...] = ()
    num_seen: int = 0
    branches: dict[str, float] = pydantic.Field(default_factory=dict)
    num_diagnosed: int = 0

    @property
    def is_too_high(self) -> bool:
        """Whether the score is too high for new images."""
        return self.selected_by == "same images" or self.num_seen > 0

    @property
    def score(self) -> Rate | float:
        """The accuracy, or with several classes per image the mAP."""
        return self.top1 if self.top1 is not None else (self.map or 0.0)

    @property
    def score_name(self) -> str:
        """The name of the score, which says if it is too high."""
        name = "mAP" if self.top1 is None else "top-1"
        return f"{name}, too high" if self.is_too_high else name

    def describe(self) -> str:
        """Describe the score, its interval and its bias in one line."""
        score = f"mAP {100 * (self.map or 0.0):.1f} %"
        if self.top1 is not None:
            score = (
                f"top-1 {100 * self.top1.share:.1f} % (95 % interval {_interval(self.top1)} %)"
            )

        note = {
            "nothing": "",
            "other images": ", corrected for their choice of the epoch",
            "same images": ", too high: they also select the epoch",
        }[self.selected_by]
        if self.tuning is not None:
            note = ", too high: they also decided for fine-tuning"
        if self.num_seen:
            note = f", too high: {self.num_seen} of them are training images"

        mirrored = " with their mirror images" if self.mirrored else ""
        return f"{score} of {self.count} validation images{mirrored}{note}"

    def lines(self) -> tuple[str, ...]:
        """Describe the best epoch and its score."""
        tuning = () if self.tuning is None else (self.tuning.describe(),)
        return (
            f"epoch {self.epoch} of {self.num_epochs}: {self.describe()}",
            *self._compare_branches(),
            *tuning,
            *_list_left_out(self),
        )

    def _compare_branches(self) -> Iterator[str]:
        """Compare the score of the network with those of its auxiliary branches, if it has some."""
        if not self.branches:
            return
        scores = {name: f"{100 * score:.1f} %" for name, score in self.branches.items()}
        network = scores.pop("main")
        listed = ", ".join(f"{name} {score}" for name, score in scores.items())
        yield (
            f"auxiliary branches, on {self.num_diagnosed} validation images: {listed}; the network "
            f"{network}, not corrected"
        )

    def describe_score(self) -> str:
        """Describe the score, as the few-shot result does."""
        return self.describe()

    def summary(self) -> tuple[str, ...]:
        """Describe the best epoch and its score."""
        return self.lines()

    def rows(self) -> list[tuple[str, str]]:
        """Describe the score."""
        return [("accuracy", self.describe())]


class Gain(StrictModel):
    """What more photographs of a class would give: an estimate for `more` instead of `count` of them.

    Copies, and photographs of one object, count as one of the `photographs`.
    `found` and `then` are the shares of new photographs of the class that are recognized.
    """

    label: str
    count: int
    photographs: int = 0
    found: Fraction
    more: int
    then: Fraction

    def describe(self) -> str:
        """Say which recall is expected now, and with more photographs."""
        kind = "independent photos" if self.photographs > self.count else "photos"
        return (
            f"{self.label}: {self.count} {kind}, recall about {100 * self.found:.0f} %; "
            f"with {self.more} about {100 * self.then:.0f} %"
        )


class ClassScore(StrictModel):
    """Precision and recall of a class with so many training `images`.

    The precision is None without a prediction of the class, the recall without a judged image.
    """

    label: str
    images: int
    precision: Fraction | None
    recall: Fraction | None


class FewShotResult(StrictModel):
    """Result of the few-shot procedure.

    Attributes:
        top1: Accuracy with its 95 % interval (`score.estimate_score`); `None` with several classes per
            image, and if fewer than two classes have images that can be judged.
        map: Mean average precision with its interval; only with several classes per image.
        estimated_on: Origin of `top1` or `map`: the validation images or cross-validation.
        class_counts: Training images of each class; the network is fitted to all of them.
        judged_counts: Images of each class that the score counts; empty in older runs.
        is_uneven: Whether the classes differ in size, so that the result says how this is corrected.
            Checkpoints and JSON call it `balanced`.
        num_duplicates: Training images with the same pixels as an earlier one; they share its fold.
        num_groups: Number of groups of training images, which show different objects or bursts.
        num_photographs: Number of different photographs; 0 in older runs, whose `num_groups` counts them.
        one_group: Classes whose images are one group, so that one fold holds all of them.
        two_groups: Classes of more than two images that are two groups.
        alike: Classes whose images look so much alike that no copies are found.
        confused: Pairs of classes that are taken for each other as by chance, so that they may be one.
        diffuse: Classes whose images resemble each other far less than the images of other classes do.
        clip: Two files of one clip or object, by their names and likeness, if there are any such groups.
        possible_clip: Two files of which this is not certain, if there are any.
        clip_pattern: A regular expression that finds what the names of a possible clip share; empty if none.
        contradictions: Files of groups with different labels, joined by " = ".
        num_selected: Images that a server kept because its network was not sure of them; the network learns
            them, but they count neither for the score nor for the threshold.
        num_doubted: Training images whose label is probably wrong (`evaluation.label_doubts`).
        without_doubted: The cross-validated accuracy on the other images, the lower of two first: of classifiers
            that learned the doubted labels, and of others that did not. None without doubted labels.
        head: The network, and the statistics that its classifier reads.
        temperature: What the scores of the classifier are divided by; the network contains it.
        strength: In results of earlier versions, scikit-learn's C of a logistic regression.
        unknown: Why no threshold for unknown images was fitted; empty if there is one.
        tuning: The comparison with the network that was fine-tuned from this one, which was not better.
        left_out: The unusable images that the run left out, each with the reason.
    """

    model_config = pydantic.ConfigDict(
        validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )
    kind: Literal["few_shot"] = "few_shot"
    top1: Rate | None = None
    map: MeanPrecision | None = None
    estimated_on: Estimate
    class_counts: dict[str, int]
    judged_counts: dict[str, int] = pydantic.Field(default_factory=dict)
    is_uneven: bool = pydantic.Field(alias="balanced")
    num_duplicates: int
    num_groups: int
    num_photographs: int = 0
    one_group: tuple[str, ...] = ()
    two_groups: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()
    confused: tuple[tuple[str, str], ...] = ()
    diffuse: tuple[str, ...] = ()
    clip: tuple[str, ...] = ()
    possible_clip: tuple[str, ...] = ()
    clip_pattern: str = ""
    contradictions: tuple[str, ...] = ()
    num_images: Count
    num_selected: int = 0
    num_doubted: int = 0
    without_doubted: tuple[Fraction, Fraction] | None = None
    gains: tuple[Gain, ...] = ()
    head: str
    num_features: Count
    temperature: Positive | None = None
    strength: Positive | None = None
    unknown: str = ""
    seconds: dict[str, float]
    tuning: Tuning | None = None
    left_out: tuple[str, ...] = ()

    @property
    def score(self) -> Rate | MeanPrecision | None:
        """The accuracy, or the mAP; None if there is no estimate."""
        return self.map if self.top1 is None else self.top1

    @property
    def score_name(self) -> str:
        """The name of the score."""
        return "top-1" if self.map is None else "mAP"

    def rows(self) -> list[tuple[str, str]]:
        """Describe the training images and the score."""
        return [("images", self.describe_images()), ("accuracy", self.describe_score())]

    def lines(self) -> tuple[str, ...]:
        """Describe images, classifier and score."""
        lines = [
            f"images: {self.describe_images()}",
            *_list_left_out(self),
            *self.describe_groups(),
        ]

        lines.append(f"classifier: {self.head}, {self.num_features:,} features")
        if self.unknown:
            lines.append(f"unknown images: {self.unknown}")
        tuning = () if self.tuning is None else (self.tuning.describe(),)
        gains = (gain.describe() for gain in self.gains[:10])
        return (*lines, *gains, self.describe_score(), *tuning)

    def summary(self) -> tuple[str, ...]:
        """Describe in at most three lines the score, what was left out, and which class needs more images.

        The network that was fine-tuned from this one has a line, too.
        """
        tuning = () if self.tuning is None else (self.tuning.describe(),)
        gains = () if self.left_out else (gain.describe() for gain in self.gains[:1])
        return (self.describe_score(), *_list_left_out(self), *gains, *tuning)

    def describe_score(self) -> str:
        """Describe the score; if always naming the largest class may be as good, add its accuracy."""
        score = self.score
        if score is None:
            return (
                "no estimate of the accuracy, which needs two different "
                "photos of two classes or more"
            )
        name = "accuracy" if self.map is None else "mAP"
        origin = "cross-validated on"
        images = "images"
        if self.estimated_on == "held-out":
            origin = "measured on"
            images = "validation images"
        counts = self.judged_counts or self.class_counts

        # An accuracy that the largest class alone reaches may show nothing.
        label = max(counts, key=lambda label: counts[label])
        # With several classes per image, perhaps no image shows any class; 1 then replaces the sum.
        majority = counts[label] / max(1, sum(counts.values()))
        comparison = ""
        if self.map is None and score.low <= majority:
            comparison = f'; always predicting "{label}" gives {100 * majority:.0f} %'

        return (
            f"{name} {100 * score.value:.1f} % (95 % interval {_interval(score)} %{comparison}), "
            f"{origin} {score.count} {images}{self._describe_without_doubted()}"
        )

    def _describe_without_doubted(self) -> str:
        """Say what the accuracy is if the doubtful labels are wrong; empty without any."""
        if self.without_doubted is None:
            return ""
        low, high = (f"{100 * share:.0f}" for share in self.without_doubted)
        share = low if low == high else f"{low} to {high}"
        doubtful = amount(self.num_doubted, "doubtful label")
        verb = "is" if self.num_doubted == 1 else "are"
        return f", or {share} % if the {doubtful} {verb} wrong"

    def describe_groups(self) -> Iterator[str]:
        """Yield notes on related, doubtful and unusual training images, if there are any."""
        photographs = self.num_photographs or self.num_groups  # 0 in older runs

        # What is not independent shares a fold of the cross-validation.
        if self.num_groups < self.num_images:
            related = []
            judged = ""
            if photographs < self.num_images:
                related = ["copies"]
                judged = "; of copies, the largest is judged"
            if self.num_groups < photographs:
                related.append("photos of one folder or object")
            groups = amount(self.num_groups, "independent group")
            yield (
                f"{self.num_images} photos, {groups}: {' and '.join(related)} "
                f"share a fold{judged}"
            )

        if self.num_selected and self.estimated_on == "cross-validation":
            yield (
                f"{self.num_selected} photos were kept because a network "
                "was not sure of them: they are learned, but the accuracy "
                "and `known` are measured on the others, which are like new "
                "ones"
            )

        if self.clip:
            yield describe_clip(self.clip)
        if self.possible_clip:
            yield describe_possible_clip(self.possible_clip, self.clip_pattern)

        # Groups that make the score of a class too low, too high or unknown.
        if self.one_group:
            yield (
                f"all images of {shorten(self.one_group)} are one group (they look "
                "alike, or are in one folder), so the accuracy of the class "
                "cannot be estimated; add different photos"
            )
        if self.two_groups:
            yield (
                f"all images of {shorten(self.two_groups)} are two groups, of "
                "which one trains and one is judged, so the accuracy of the class "
                "is probably too low; add different photos"
            )
        if self.alike:
            yield (
                f"the images of {shorten(self.alike)} look too much alike to find copies; "
                "if there are several of one object, the accuracy is too high: "
                "give each object a folder"
            )

        if self.num_doubted:
            yield (
                f"{amount(self.num_doubted, 'label')} of {self.num_images} "
                f"probably wrong; list them: {LIST_WRONG_LABELS}"
            )

        yield from self._describe_classes()

    def _describe_classes(self) -> Iterator[str]:
        """Yield notes on classes that may be one, or none, and on labels that contradict each other."""
        if self.confused:
            pairs = shorten([f"{label} and {other}" for label, other in self.confused])
            yield (
                f"{pairs} are taken for each other as by chance; if they show one "
                "thing, merge the folders"
            )

        if self.diffuse:
            yield (
                f"the images of {shorten(self.diffuse)} resemble each other far "
                "less than the images of other classes do. If this is a class for anything "
                "else, leave it out and give its folder as --unknown: with such a class, "
                "7 to 17 % of foreign images passed as another class, "
                "without it 2 % (eight sets)"
            )

        if self.contradictions:
            yield (
                "these have different labels, but look like copies; look at them before "
                f"you correct or delete one: {shorten(self.contradictions, '; ')}"
            )

    def describe_images(self) -> str:
        """Describe the training images: their classes, imbalance, and duplicates."""
        counts = self.class_counts
        text = ", ".join(f"{label} {count}" for label, count in counts.items())
        if self.is_uneven:
            # The smallest class may have no images, and counts as one.
            ratio = max(counts.values()) / max(1, min(counts.values()))
            text += (
                f"; the largest is {ratio:.1f} times the smallest, and the logits "
                "are corrected for it"
            )

        # Classes with few images, unless a line of `gains` names them.
        estimated = {gain.label for gain in self.gains}
        few = [
            label
            for label, count in counts.items()
            if count < _FEW_IMAGES and label not in estimated
        ]
        if few:
            text += f"; fewer than {_FEW_IMAGES} images of {', '.join(few)}: add more"
        if self.num_duplicates:
            text += f"; {amount(self.num_duplicates, 'duplicate')}"

        return text


def describe_notes(result: LoopResult | FewShotResult) -> list[str]:
    """List what the owner of the images should know: related and doubtful images, and classes that need more.

    There are at most ten lines of classes.
    """
    if isinstance(result, LoopResult):
        return []
    return [*result.describe_groups(), *(gain.describe() for gain in result.gains[:10])]


class PageTexts(NamedTuple):
    """What the page says about a result: how was trained, and what the validation images are."""

    procedure: str
    held_out: str


def describe_for_page(result: LoopResult | FewShotResult) -> PageTexts:
    """Build the texts of the page; for a training loop, they say why scores are too high."""
    held_out = "the validation images"
    if isinstance(result, FewShotResult):
        return PageTexts("as a linear classifier on frozen features", held_out)

    # A loop's scores are too high if its validation images have also selected the epoch.
    if result.selected_by != "nothing":
        selection = "the epoch" if result.tuning is None else "fine-tuning"
        held_out += (
            f", which also selected {selection}, so all scores of this section are too high"
        )

    if result.num_seen:
        held_out += f"; {result.num_seen} are training images, so all scores are too high"
    if result.mirrored:
        held_out += "; without their mirror images, as a server computes them"
    number = amount(result.num_epochs, "epoch")
    return PageTexts(f"for {number}, of which the {result.epoch}. counts", held_out)


AnyProcedureResult = Annotated[LoopResult | FewShotResult, pydantic.Field(discriminator="kind")]
_ADAPTER: pydantic.TypeAdapter[AnyProcedureResult] = pydantic.TypeAdapter(AnyProcedureResult)


def read_result(training: Mapping[str, Any]) -> AnyProcedureResult | None:
    """Read the result from the record of a training, None before its end; raises `CheckpointError`."""
    if "procedure" not in training:
        return None

    try:
        return _ADAPTER.validate_python(training["procedure"])
    except pydantic.ValidationError as error:
        raise CheckpointError(
            "the checkpoint has no valid result of a training procedure"
            + (version_advice(writer_of(training)) or "; train again with this version")
        ) from error
