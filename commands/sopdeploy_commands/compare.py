"""`sopdeploy compare`: compare two bundles on the same labelled images, with the server's code.

Letter: N images.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.base.config import StrictModel
from sopdeploy.base.project import AS_IT_IS, MAX_RECORDED
from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy.cli.command import command
from sopdeploy.cli.console import err, plain_text, print_table, say
from sopdeploy.data.folders.evaluation_images import open_evaluation_images
from sopdeploy.data.photos.copies import MAX_COMPARED, Grouped, group_photographs
from sopdeploy.data.photos.kept import decides, is_sampled, kept_id
from sopdeploy.data.photos.photo import ImageFiles
from sopdeploy.errors import ConfigError, DataError, amount
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.statistics import (
    Z_90,
    difference_interval,
    mcnemar,
    passing_gain,
)
from sopdeploy.html.report import percent
from sopdeploy_commands.scores import outputs_of_images
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.settings import Settings, load_settings

TOLERANCE = 5.0  # points that a bundle may lose on up to `TOLERANCE_IMAGES` images
TOLERANCE_IMAGES = 100
MIN_IMAGES = 20  # with fewer, the interval is wrong more often than stated, and nothing passes
Tolerance = Annotated[float, pydantic.Field(ge=0, le=50)]  # percentage points


class BundleScore(StrictModel):
    """The accuracy of one bundle, and the median of the seconds per image, from file to prediction."""

    bundle: str
    top1: Rate
    seconds: float


class ClassRecall(StrictModel):
    """How many of the `num_images` of a class the first and the second bundle classify correctly."""

    label: str
    num_images: int
    first: int
    second: int


class BundleComparison(StrictModel):
    """The second bundle compared with the first on `num_images` images, with fractions of them.

    Only the second bundle is right on `wins` images, only the first on `losses`. `low` and `high`
    are Tango's 90 % interval of the `difference` of the accuracies, `p` is McNemar's exact
    p-value. A `low` below minus the `tolerance` does not pass, nor do fewer than 20 images.
    Training images of the bundles and their copies (`num_trained_on`), other copies
    (`num_copies`), and photos that a server kept for training (`num_for_training`) were left out.
    `num_out_of_fold` photos of a server's random sample have trained a bundle, whose cross-validation has
    answered them. `removed` are classes that only the first bundle has.
    """

    first: BundleScore
    second: BundleScore
    num_images: int
    num_trained_on: int
    num_copies: int
    num_for_training: int
    num_out_of_fold: int = 0
    wins: int
    losses: int
    difference: float
    low: float
    high: float
    p: float
    tolerance: float
    classes: tuple[ClassRecall, ...]
    removed: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def passes(self) -> bool:
        """Whether a loss of more than the tolerance is unlikely."""
        return self.num_images >= MIN_IMAGES and self.low >= -self.tolerance

    @property
    def summary(self) -> str:
        """The result and its figures, in one line."""
        verdict = "passes" if self.passes else "may lose too much"
        if self.num_images < MIN_IMAGES:
            verdict = f"fewer than {MIN_IMAGES} images"
        return (
            f"{verdict}: of {self.num_images:,} images {self.second.top1.right:,} right, before "
            f"{self.first.top1.right:,}: {100 * self.difference:+.1f} points "
            f"({100 * self.low:+.1f} to {100 * self.high:+.1f}, at least {-100 * self.tolerance:.1f})"
        )

    def describe_power(self) -> str:
        """Say which gains pass in 8 of 10 cases with so many images, and with more, if as many answers differ."""
        changed = (self.wins + self.losses + 1) / (self.num_images + 2)
        more = max(100, 4 * self.num_images)
        largest = self.tolerance / narrow_tolerance(1.0, self.num_images)
        gains = [
            100 * passing_gain(changed, count, narrow_tolerance(largest, count))
            for count in (self.num_images, more)
        ]
        return (
            f"of these {self.num_images:,} images, {describe_gain(gains[0])} in 8 of 10 cases; "
            f"of {more:,}, {describe_gain(gains[1])}"
        )


def describe_gain(points: float) -> str:
    """Say which true gain, in percentage points, passes; below 0, also a loss does."""
    if points > 0:
        return f"a gain of {amount(max(1, round(points)), 'point')} passes"
    return "a bundle that is equally good passes"


def show_comparison(result: BundleComparison) -> None:
    """Print both bundles, the recall of each class, and the difference."""
    for note in result.notes:
        err.print(plain_text(f"warning: {note}"))

    scores = (result.first, result.second)
    rows = []
    for score in scores:
        interval = f"{percent(score.top1.low)} to {percent(score.top1.high)}"
        seconds = f"{1000 * score.seconds:.1f}"
        rows.append((score.bundle, percent(score.top1.share), interval, seconds))
    print_table(("bundle", "accuracy", "95 %", "ms per image"), rows)

    recalls = []
    for one in result.classes:
        first, second = (percent(right / one.num_images) for right in (one.first, one.second))
        recalls.append((one.label, str(one.num_images), first, second))
    print_table(("class", "images", "recall, first", "recall, second"), recalls)

    if result.removed:
        say(f"only in the first bundle: {', '.join(result.removed)}")
    say(
        f"left out: {result.num_trained_on} training images and copies of them, "
        f"{result.num_copies} other copies, {result.num_for_training} kept for training",
        f"answered without the photo, by cross-validation: {result.num_out_of_fold}",
        f"only the second is right on {result.wins}, only the first on {result.losses}, "
        f"McNemar p {result.p:.2g}",
    )
    say(result.describe_power())
    say(result.summary, style="bold")


@command(
    show_comparison,
    options={"data"},
    examples=("sopdeploy compare bundles/live bundles/latest --data photos",),
)
def compare(
    first: Path,
    second: Path,
    data: Path,
    *,
    tolerance: Tolerance = TOLERANCE,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> BundleComparison:
    """Compare the accuracy of two bundles on the same labelled images.

    Training images of either bundle, copies, and folders that are not a class of either bundle are
    left out. Edited copies are found only if a bundle was exported with `--with-features`. Of the photos
    that a server kept, those of its random sample count. If they trained a bundle, the answers of its
    cross-validation count, which the bundle records.

    Args:
        first: A bundle, such as the live one.
        second: The bundle to compare with it.
        data: Folder of images that neither bundle was trained on, DIR/<class>/*.jpg.
        tolerance: Points of accuracy that the second bundle may lose on up to 100 images, and half
            as many on 1,000.
        on_image: Called with the numbers of predictions done and in total.

    Raises:
        DataError: An image that cannot be decoded within the limits of a server, or no image remains.
        ConfigError: A bundle predicts several classes per image.
        BundleError: A bundle is damaged.
    """
    settings = load_settings()
    pair = [load_model(path, settings) for path in (first, second)]
    return compare_loaded(pair, data, settings, tolerance=tolerance, on_image=on_image)


def compare_loaded(
    pair: Sequence[LoadedModel],
    data: Path,
    settings: Settings,
    *,
    tolerance: float,
    on_image: Callable[[int, int], None],
) -> BundleComparison:
    """Compare the two bundles of *pair* as `compare` does."""
    for model in pair:
        if model.bundle.manifest.rules.is_multi_label:
            raise ConfigError(
                f"{model.bundle.name}: predicts several classes per image; use `sopdeploy eval`"
            )

    notes: list[str] = []
    selected = _select_images(data, pair, settings, notes)
    images = selected.images

    done = itertools.count(1)
    first, second = (
        _run(model, images, answers, settings, lambda: on_image(next(done), 2 * len(images)))
        for model, answers in zip(pair, selected.answers, strict=True)
    )

    wins = int((second.right & ~first.right).sum())
    losses = int((first.right & ~second.right).sum())
    interval = difference_interval(wins, losses, len(images), Z_90)
    first_labels, second_labels = (model.bundle.labels for model in pair)
    return BundleComparison(
        first=first.score,
        second=second.score,
        num_images=len(images),
        num_trained_on=selected.num_trained_on,
        num_copies=selected.num_copies,
        num_for_training=selected.num_for_training,
        num_out_of_fold=selected.num_out_of_fold,
        wins=wins,
        losses=losses,
        difference=(wins - losses) / len(images),
        low=interval.low,
        high=interval.high,
        p=mcnemar(wins, losses),
        tolerance=narrow_tolerance(tolerance, len(images)) / 100,
        classes=tuple(_count_recalls(images, first.right, second.right)),
        removed=tuple(sorted(set(first_labels) - set(second_labels))),
        notes=tuple(notes),
    )


def narrow_tolerance(tolerance: float, num_images: int) -> float:
    """Return how much of *tolerance* remains with *num_images*: all up to 100, half with 1,000.

    Few images cannot show a small loss, and many can.
    """
    tenfolds = math.log10(max(1.0, num_images / TOLERANCE_IMAGES))
    return tolerance * 0.5**tenfolds


class Selected(NamedTuple):
    """The `images` (N,) that are compared, and how many are not, as in `BundleComparison`.

    `answers` has for each bundle the classes (N,) that its cross-validation answered, -1 where the bundle
    itself answers.
    """

    images: ImageFiles
    answers: tuple[NDArray[np.int64], ...]
    num_trained_on: int
    num_copies: int
    num_for_training: int
    num_out_of_fold: int


def _select_images(
    data: Path, pair: Sequence[LoadedModel], settings: Settings, notes: list[str]
) -> Selected:
    """Open the images in *data* of the classes of *pair*, one of each group of copies.

    Groups with a training image are left out, except photos that a cross-validation has answered, and
    photos that a server kept for training. *notes* receives lines about the folder. Raises `DataError` if no
    image remains.
    """
    labels = {label for model in pair for label in model.bundle.labels}
    origin = pair[1].bundle.manifest.origin  # of the newer bundle
    images = open_evaluation_images(
        data,
        tuple(sorted(labels)),
        other_classes=True,
        reading=AS_IT_IS if origin is None else origin.reading,
        log=notes.append,
    )
    if len(images) > MAX_COMPARED:
        notes.append(f"{data}: over {MAX_COMPARED:,} images; only equal files are left out")

    # Of the photos that a server kept, those of its random sample count, and all that no server kept.
    names = [images.path(index).name for index in range(len(images))]
    may_decide_N = np.array([is_sampled(name) or not kept_id(name) for name in names])

    # Copies share a group. An image counts if neither bundle was trained on one of its group, or if the
    # cross-validation has answered it, which keeps groups together.
    grouped = group_photographs(images, _compute_features(images, pair, settings))
    may_answer_N = np.ones(len(images), np.bool_)
    answers = []
    for model in pair:
        trained_on_N = _find_trained_on(grouped, names, model, notes)
        answers_N = _find_answers(grouped.file_hashes, model)
        answers.append(answers_N)
        may_answer_N &= ~trained_on_N | (answers_N >= 0)
    remains_N = may_decide_N & may_answer_N
    if not remains_N.any():
        raise DataError(f"{data}: all of these images are for training; give others")

    # The first of each group counts.
    counts_N = np.zeros(len(images), np.bool_)
    remaining = np.flatnonzero(remains_N)
    counts_N[remaining[np.unique(grouped.groups[remaining], return_index=True)[1]]] = True
    counted = tuple(answers_N[counts_N] for answers_N in answers)
    return Selected(
        images=images.select(counts_N),
        answers=counted,
        num_trained_on=int((~may_answer_N).sum()),
        num_copies=int((remains_N & ~counts_N).sum()),
        num_for_training=int((~may_decide_N & may_answer_N).sum()),
        num_out_of_fold=int((np.stack(counted) >= 0).any(axis=0).sum()),
    )


def _compute_features(
    images: ImageFiles, pair: Sequence[LoadedModel], settings: Settings
) -> NDArray[np.float32] | None:
    """Compute the features (N, D) of *images* by the newer bundle of *pair* that has this output; None without."""
    for model in reversed(pair):
        names = [output.name for output in model.bundle.manifest.outputs]
        if EMBEDDING in names and len(images) <= MAX_COMPARED:
            return outputs_of_images(model, EMBEDDING, images, settings, lambda: None)
    return None


def _find_trained_on(
    grouped: Grouped, names: Sequence[str], model: LoadedModel, notes: list[str]
) -> NDArray[np.bool_]:
    """Find the images (N,) with these *names* that show what *model* was trained on, or may have been.

    A record has at most `MAX_RECORDED` training images. If it may lack some, only the half of a server's
    random sample that no such training uses was surely not trained on. *notes* receives lines about records
    that are missing or not complete.
    """
    name = model.bundle.name
    origin = model.bundle.manifest.origin
    if origin is None or not origin.sample:
        notes.append(f"{name}: its training images are not recorded; leave them out yourself")
        return np.zeros(len(names), np.bool_)

    in_record_N = np.isin(grouped.file_hashes, origin.sample)
    trained_on_N = np.isin(grouped.groups, grouped.groups[in_record_N])
    is_partial = len(origin.sample) == MAX_RECORDED and bool(in_record_N.any())
    if is_partial:
        notes.append(
            f"{name}: may have been trained on more of these images than its record tells"
        )
    if is_partial and not origin.out_of_fold:
        trained_on_N |= np.array([is_sampled(name) and not decides(name) for name in names])
    return trained_on_N | np.isin(
        grouped.file_hashes, [file_hash for file_hash, _ in origin.out_of_fold]
    )


def _find_answers(file_hashes: NDArray[np.int64], model: LoadedModel) -> NDArray[np.int64]:
    """Return the class that the cross-validation of *model* answered for each of *file_hashes* (N,), or -1."""
    origin = model.bundle.manifest.origin
    answers = {} if origin is None else dict(origin.out_of_fold)
    return np.array([answers.get(file_hash, -1) for file_hash in file_hashes.tolist()])


class Run(NamedTuple):
    """The score of a bundle, and on which images (N,) it is `right`."""

    score: BundleScore
    right: NDArray[np.bool_]


def _run(
    model: LoadedModel,
    images: ImageFiles,
    answers_N: NDArray[np.int64],
    settings: Settings,
    on_image: Callable[[], None],
) -> Run:
    """Let *model* classify *images*, except those with *answers_N*, -1 without; classes are compared by name."""
    times = [time.perf_counter()]

    def count_image() -> None:
        times.append(time.perf_counter())
        on_image()

    logits = model.bundle.manifest.outputs[0].name
    logits_NC = outputs_of_images(model, logits, images, settings, count_image)
    answered_N = np.where(answers_N < 0, logits_NC.argmax(axis=1), answers_N)
    predicted_N = np.array(model.bundle.labels)[answered_N]
    right_N = predicted_N == np.array(images.labels)[images.targets]
    score = BundleScore(
        bundle=model.bundle.name,
        top1=Rate.of(int(right_N.sum()), len(images)),
        seconds=median(np.diff(times).tolist()),
    )
    return Run(score, right_N)


def _count_recalls(
    images: ImageFiles, first_N: NDArray[np.bool_], second_N: NDArray[np.bool_]
) -> Iterator[ClassRecall]:
    """Count the images of each class, and how many of them are right by *first_N* and *second_N*."""
    for target in np.unique(images.targets).tolist():
        of_class_N = images.targets == target
        yield ClassRecall(
            label=images.labels[target],
            num_images=int(of_class_N.sum()),
            first=int(first_N[of_class_N].sum()),
            second=int(second_N[of_class_N].sum()),
        )
