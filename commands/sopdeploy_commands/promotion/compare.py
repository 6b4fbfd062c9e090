"""`sopdeploy compare`: compare two bundles on the same photographs, with the server's code.

What decides is the photographs of classes that both bundles have. Photographs of a class that
only the second bundle has are wrong for the first one by definition; counted, they would hide a
loss in the other classes. They are reported beside the comparison, in which the answer "new
class" to another photograph is a mistake.

Photographs that a bundle was trained on are left out: `Origin.sample` has their hashes.
Near-duplicates are not independent; only the first of a group counts. Letters: N photographs, C
classes.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, TypedDict

import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.bundle.live import LOG, read_log
from sopdeploy.cli.command import command
from sopdeploy.cli.console import err, plain_text, print_table, say
from sopdeploy.config import OtherVersionError, StrictModel, Text, validate_format
from sopdeploy.errors import ConfigError, DataError, amount, shorten
from sopdeploy.evaluation.metrics import Rate, log_loss
from sopdeploy.evaluation.statistics import (
    ALPHA,
    TESTABLE,
    TOLERANCE,
    Verdict,
    decide,
    difference_interval,
    holm,
    images_to_decide,
    mcnemar,
    smallest_difference,
)
from sopdeploy.html.report import percent
from sopdeploy.names import LinkPath
from sopdeploy.photos.copies import MAX_SIGNATURES, group_photographs
from sopdeploy.photos.folder import open_evaluation_images, open_unknown
from sopdeploy.photos.photo import ImageFiles
from sopdeploy.project import SAMPLED, Time
from sopdeploy_commands.bundles.scores import logits_of_images
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.settings import Settings, load_settings

Tolerance = Annotated[float, pydantic.Field(ge=0, le=50)]  # percentage points
FEW = 5  # photographs of a class, which tell whether it is worse only if nearly all change


class BundleScore(StrictModel):
    """Accuracy and log loss of one bundle; shares of known and of rejected unknown images, if it has any."""

    bundle: str
    id: str
    top1: Rate
    log_loss: float
    accepted: Rate | None
    rejected: Rate | None


class Change(StrictModel):
    """Images that only the second bundle answers correctly (`wins`), or only the first (`losses`).

    `p` is McNemar's exact p-value. Of unknown images, a correct answer is that they are
    unknown; a bundle without a threshold has none.
    """

    wins: int
    losses: int
    p: float | None = None

    @property
    def is_worse(self) -> bool:
        """Whether the second bundle is worse on these images."""
        return self.p is not None and self.p <= ALPHA and self.losses > self.wins


class ClassChange(Change):
    """One class; `p` is corrected by Holm's method over classes with `TESTABLE` changes, else None."""

    label: str
    num_images: int
    first: int
    second: int


class BundleComparison(StrictModel):
    """The second bundle compared with the first on `num_images` photographs of `classes`.

    Accuracies and differences are fractions. `new` and `removed` are classes of the second or
    the first bundle only. `num_copies` near-duplicates, those of unknown images included, and
    `trained_on` training images were left out. `suspects` are bundles some of whose training
    images were found, but whose record of them is incomplete. `attempt` counts the comparisons
    of `promote` with this first bundle, and includes this one. `num_more_images` would decide
    what is undecided, in the next attempt. `unknown` is None without unknown images; a second
    bundle that rejects fewer of them is worse.
    """

    first: BundleScore
    second: BundleScore
    num_images: int
    num_copies: int
    trained_on: int
    suspects: tuple[str, ...]
    wins: int
    losses: int
    difference: float
    low: float
    high: float
    p: float
    tolerance: float
    attempt: int
    verdict: Verdict
    num_more_images: int | None
    unknown: Change | None
    classes: tuple[ClassChange, ...]
    new: tuple[ClassChange, ...]
    removed: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        text: str = self.verdict
        no_answer_differs = self.wins == self.losses == 0
        if self.unknown is not None:
            no_answer_differs = (
                no_answer_differs and self.unknown.wins == self.unknown.losses == 0
            )
        if text == "not worse":
            text += f" within {100 * self.tolerance:g} points"
        elif no_answer_differs and self.first.id == self.second.id:
            text = "no difference, both are the same bundle"
        elif text == "undecided" and self.num_more_images is not None:
            rounded = float(f"{self.num_more_images:.1e}")  # to two digits
            text += f" (about {rounded:,.0f} more labels would decide)"
        if self.unknown is not None and self.unknown.is_worse:
            text += f", rejects {self.unknown.losses - self.unknown.wins} fewer unknown images"
        if no_answer_differs:
            text += ", no answer differs"
        points, low, high = (
            f"{100 * share:+.1f}" for share in (self.difference, self.low, self.high)
        )
        text += f": {points} points ({low} to {high}) on {self.num_images:,} photographs"
        return text if self.attempt < 2 else f"{text}, attempt {self.attempt}"

    @property
    def evidence(self) -> str:
        """What these photographs can show, and of which classes they show little, in one line."""
        shown = 100 * smallest_difference(self.wins, self.losses, self.num_images)
        text = f"{amount(self.num_images, 'photograph')} show differences from about {shown:.2g} points"
        few = [
            f"{change.num_images} of {change.label}"
            for change in self.classes
            if change.num_images < FEW
        ]
        return f"{text}; fewer than {FEW} of a class: {shorten(few)}" if few else text

    @property
    def worse_classes(self) -> list[str]:
        """Classes in which the second bundle is worse."""
        return [change.label for change in self.classes if change.is_worse]


class Promotion(StrictModel):
    """One move of the link named `link`, or a refused one: who, when, why, and the figures.

    `before` and `after` are bundles, as paths relative to the folder of the link. `before` is
    None for the first bundle; `comparison` is None if nothing was compared.
    """

    time: Time
    user: Text
    link: LinkPath
    before: LinkPath | None
    after: LinkPath
    reason: Text
    refused: bool = False
    comparison: BundleComparison | None = None


def _show(result: BundleComparison) -> None:
    """Print both bundles, their classes and the verdict."""
    for note in result.notes:
        err.print(plain_text(f"warning: {note}"))
    rows = []
    for score in (result.first, result.second):
        interval = f"{percent(score.top1.low)} to {percent(score.top1.high)}"
        shares = (
            percent(rate.share) if rate else "-" for rate in (score.accepted, score.rejected)
        )
        rows.append(
            (
                score.bundle,
                percent(score.top1.share),
                interval,
                f"{score.log_loss:.3f}",
                *shares,
            )
        )
    print_table(("bundle", "top-1", "95 %", "log loss", "known", "unknown rejected"), rows)
    class_rows = []
    for change in result.classes:
        shares = (percent(right / change.num_images) for right in (change.first, change.second))
        p_value = "" if change.p is None else f"{change.p:.2g}"
        class_rows.append(
            (
                change.label,
                str(change.num_images),
                *shares,
                f"{change.wins}, {change.losses}",
                p_value,
            )
        )
    print_table(("class", "images", "first", "second", "better, worse", "p, Holm"), class_rows)
    for change in result.new:
        say(
            f"new class {change.label}: {change.second} of {change.num_images} correct, not counted"
        )
    if result.removed:
        say(f"only in the first bundle, not counted: {', '.join(result.removed)}")
    say(
        f"left out: {result.num_copies} near-duplicates, {result.trained_on} photographs from the training",
        f"better on {result.wins}, worse on {result.losses} photographs, McNemar p {result.p:.2g}",
        result.evidence,
    )
    say(result.summary, style="bold")


@command(_show, options={"data"})
def compare(
    first: Path,
    second: Path,
    data: Path,
    *,
    unknown: Path | None = None,
    tolerance: Tolerance = 100 * TOLERANCE,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> BundleComparison:
    """Say whether a bundle is better than another one, not worse, or worse, on the same photographs.

    The photographs of classes of both bundles decide. Training images and near-duplicates are
    left out; so are folders that are no class of either bundle, with a note.

    Example: sopdeploy compare bundles/photos-3f6c01d2a4b7 bundles/latest --data held-out

    Args:
        first: A bundle, such as the live one.
        second: The bundle to compare with it.
        data: Folder of images that neither was trained on, DIR/<class>/*.jpg.
        unknown: Folder of images of none of the classes, which test `known`; of those that a server kept,
            only the uniform sample counts.
        tolerance: Points of accuracy by which a bundle that is not worse may lose.
        on_image: Called with the numbers of predictions done and in total.

    Raises:
        DataError: An image that the server would reject, or no photograph of a common class remains.
        ConfigError: A bundle predicts several classes per image.
        BundleError: A bundle is damaged.
    """
    settings = load_settings()
    # `latest` is the last export here, even if another bundle is live.
    pair = [load_model(Path(os.path.realpath(path)), settings) for path in (first, second)]
    return compare_loaded(
        pair,
        data,
        count_comparisons(first),
        settings,
        unknown=unknown,
        tolerance=tolerance,
        on_image=on_image,
    )


def compare_loaded(
    pair: Sequence[LoadedModel],
    data: Path,
    num_earlier: int,
    settings: Settings,
    *,
    unknown: Path | None,
    tolerance: float,
    on_image: Callable[[int, int], None],
) -> BundleComparison:
    """Compare the two bundles of *pair* as `compare` does, after *num_earlier* comparisons."""
    for model in pair:
        if model.bundle.manifest.rules.is_multi_label:
            raise ConfigError(
                f"{model.bundle.name}: predicts several classes per image; use `sopdeploy eval`"
            )
    notes: list[str] = []
    first_labels, second_labels = set(pair[0].bundle.labels), set(pair[1].bundle.labels)
    all_labels = tuple(sorted(first_labels | second_labels))
    all_images = open_evaluation_images(data, all_labels, other_classes=True, log=notes.append)
    images, left_out = _leave_out_seen(all_images, pair, notes)
    labels, targets = (
        images.labels,
        images.targets.astype(np.int64),
    )  # a target is an index in *labels*
    common_labels = first_labels & second_labels
    is_common_C = np.array([label in common_labels for label in labels])
    common_N = is_common_C[targets]  # the photographs that decide; the others are only reported
    if not common_N.any():
        raise DataError(f"{data}: no photograph of a class of both bundles remains; add some")
    unknown_images: ImageFiles | None = None
    if unknown is not None:
        unknown_images, note = open_unknown(unknown)
        if note:
            notes.append(note)
    if unknown_images is not None:
        are_first = _are_first(group_photographs(unknown_images).groups)
        left_out["num_copies"] += int((~are_first).sum())
        unknown_images = unknown_images.select(are_first)
    num_unknown = 0 if unknown_images is None else len(unknown_images)
    total = len(pair) * (len(images) + num_unknown)  # predictions
    done = itertools.count(1)
    shared = (images, common_N, unknown_images, settings, lambda: on_image(next(done), total))
    first, second = _evaluate(pair[0], *shared), _evaluate(pair[1], *shared)

    classes = compare_classes(
        labels, targets[common_N], first.right[common_N], second.right[common_N]
    )
    other_N = ~common_N
    other_classes = compare_classes(
        labels, targets[other_N], first.right[other_N], second.right[other_N]
    )
    wins = sum(change.wins for change in classes)
    losses = sum(change.losses for change in classes)
    count, tolerated, attempt = int(common_N.sum()), tolerance / 100, num_earlier + 1
    low, high = difference_interval(wins, losses, count)
    verdict = decide(wins, losses, count, tolerated, attempt)
    rejections: Change | None = None
    if first.rejected is not None and second.rejected is not None:
        counts = _count_changes(first.rejected, second.rejected)
        rejections = Change(**counts, p=mcnemar(**counts))
        if rejections.is_worse:  # even if it is better on the photographs
            verdict = "worse"
    return BundleComparison(
        first=first.score, second=second.score, num_images=count, **left_out,
        wins=wins, losses=losses, difference=(wins - losses) / count, low=low, high=high,
        p=mcnemar(wins, losses), tolerance=tolerated, attempt=attempt, verdict=verdict, unknown=rejections,
        classes=classes, new=[change for change in other_classes if change.label in second_labels],
        removed=sorted(first_labels - second_labels), notes=notes,
        # More images are for another attempt, which needs stronger evidence than this one.
        num_more_images=images_to_decide(wins, losses, count, tolerated, attempt + 1),
    )  # fmt: skip


def read_promotions(link: Path) -> list[Promotion]:
    """Read the recorded moves of *link* and the refused ones, the oldest first.

    Raises `ConfigError` as `read_log` does, and for a line that cannot be read, as one of a later
    version: each attempt and each move counts.
    """
    promotions = []
    for number, fields in read_log(link.parent):
        if fields.get("link") == link.name:
            try:
                promotions.append(validate_format(Promotion, fields))
            except ValueError as error:
                advice = (
                    ""
                    if isinstance(error, OtherVersionError)
                    else "; repair or remove this line"
                )
                log = link.with_name(LOG)
                raise ConfigError(f"{log}: line {number}: {error}{advice}") from error
    return promotions


def read_link(link: Path) -> str | None:
    """Read the path of the bundle to which *link* leads, relative to its folder; None if it is no link."""
    if not link.is_symlink():
        return None
    target = str(link.readlink())
    if not (link.parent / target).is_symlink():
        return target
    return os.path.relpath(os.path.realpath(link), os.path.realpath(link.parent))


def count_comparisons(link: Path) -> int:
    """Count the recorded comparisons with the bundle that *link* leads to; equal ones count once."""
    different, live = set(), read_link(link)
    if live is None:
        return 0
    for promotion in read_promotions(link):
        compared = promotion.comparison
        if promotion.before == live and compared is not None:
            different.add(
                (promotion.after, compared.num_images, compared.wins, compared.losses)
            )
    return len(different)


class LeftOut(TypedDict):
    """The fields of `BundleComparison` about photographs that are not compared."""

    num_copies: int
    trained_on: int
    suspects: list[str]


def _leave_out_seen(
    images: ImageFiles, pair: Sequence[LoadedModel], notes: list[str]
) -> tuple[ImageFiles, LeftOut]:
    """Leave out training images of the bundles with their near-duplicates, and copies among the others.

    Also returns what was left out. A suspect is a bundle that was trained on some of the
    images, and whose record is full: it may have seen more of them.
    """
    grouped = group_photographs(images)
    recorded_N = np.zeros(len(images), np.bool_)  # whether the record of a bundle has the file
    suspects = []
    for model in pair:
        name, origin = model.bundle.name, model.bundle.manifest.origin
        if origin is None or not origin.sample:
            notes.append(
                f"{name}: its training images are not recorded; leave them out yourself"
            )
            continue
        of_bundle_N = np.isin(grouped.file_hashes, origin.sample)
        recorded_N |= of_bundle_N
        if of_bundle_N.any() and len(origin.sample) == SAMPLED:
            suspects.append(name)
    if len(images) > MAX_SIGNATURES:
        notes.append(
            f"{images.root}: over {MAX_SIGNATURES:,} images; only equal files are left out"
        )
    group_N = grouped.groups  # equal for near-duplicates
    trained_on_N = np.isin(
        group_N, group_N[recorded_N]
    )  # also the near-duplicates of recorded images
    is_first_N = _are_first(group_N)
    kept_N = is_first_N & ~trained_on_N
    if not kept_N.any():
        raise DataError(
            f"{images.root}: a bundle was trained on all of these photographs; give others"
        )
    left_out: LeftOut = {
        "num_copies": int((~is_first_N & ~trained_on_N).sum()),
        "trained_on": int(trained_on_N.sum()),
        "suspects": suspects,
    }
    return images.select(kept_N), left_out


def _are_first(group_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the mask (N,) of the images that are the first of their group."""
    _, first_G = np.unique(
        group_N, return_index=True
    )  # the index of the first image of each of G groups
    return np.isin(np.arange(len(group_N)), first_G)


class Evaluated(NamedTuple):
    """A bundle's score, which photographs (N,) are `right`, and which unknown images (U,) are `rejected`."""

    score: BundleScore
    right: NDArray[np.bool_]
    rejected: NDArray[np.bool_] | None


def _evaluate(
    loaded: LoadedModel,
    images: ImageFiles,
    common_N: NDArray[np.bool_],
    unknown: ImageFiles | None,
    settings: Settings,
    on_image: Callable[[], None],
) -> Evaluated:
    """Run a bundle on *images* and, if given, *unknown* ones; score it on those of the mask *common_N*."""
    bundle, labels = loaded.bundle, images.labels
    logits_NC, known_N = _predict_known(loaded, images, settings, on_image)
    rejected = None  # or a mask (U,)
    if unknown is not None:
        _, known_U = _predict_known(loaded, unknown, settings, on_image)
        rejected = ~known_U
    # A class has two numbers: its target, the index in *labels*, and its output, the index in
    # the bundle.
    target_of_output = np.array([labels.index(label) for label in bundle.labels])
    right_N = target_of_output[logits_NC.argmax(axis=1)] == images.targets
    labels_K = [
        labels[target] for target in images.targets[common_N]
    ]  # of the K photographs in the mask
    outputs_K = np.array([bundle.labels.index(label) for label in labels_K])
    has_rule = bundle.manifest.rules.rejection is not None
    score = BundleScore(
        bundle=bundle.name,
        id=bundle.manifest.id,
        top1=Rate.of(int(right_N[common_N].sum()), len(labels_K)),
        log_loss=log_loss(logits_NC[common_N].astype(np.float64), outputs_K),
        accepted=Rate.of(int(known_N[common_N].sum()), len(labels_K)) if has_rule else None,
        rejected=Rate.of(int(rejected.sum()), len(rejected))
        if has_rule and rejected is not None
        else None,
    )
    return Evaluated(score, right_N, rejected)


def _predict_known(
    loaded: LoadedModel, images: ImageFiles, settings: Settings, on_image: Callable[[], None]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the logits (N, C) of *images* and the mask (N,) of known ones: all without a threshold."""
    logits = logits_of_images(loaded, images, settings, on_image)
    answers = [loaded.bundle.manifest.rules.answer(row, top_k=1) for row in logits]
    return logits, np.array([answer.known is not False for answer in answers])


def _count_changes(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> dict[str, int]:
    """Count the images that only the *second* bundle answers correctly, `wins`, or the *first*, `losses`."""
    return {"wins": int((second & ~first).sum()), "losses": int((first & ~second).sum())}


def compare_classes(
    labels: Sequence[str],
    targets_N: NDArray[np.int64],
    first_N: NDArray[np.bool_],
    second_N: NDArray[np.bool_],
) -> list[ClassChange]:
    """Compare the two bundles in each class of *targets_N*; *first_N* and *second_N*: what they get right."""
    changes = []
    for target in np.unique(targets_N).tolist():
        first, second = first_N[targets_N == target], second_N[targets_N == target]
        change = ClassChange(
            label=labels[target],
            num_images=len(first),
            first=int(first.sum()),
            second=int(second.sum()),
            **_count_changes(first, second),
        )
        changes.append(change)
    # Classes below `TESTABLE` cannot become significant, so they are left out of the
    # correction. Which ones these are depends only on the sum of wins and losses, which says
    # nothing about the better bundle.
    tested = [change for change in changes if change.wins + change.losses >= TESTABLE]
    corrected = holm([mcnemar(change.wins, change.losses) for change in tested])
    p_values = {change.label: p for change, p in zip(tested, corrected, strict=True)}
    return [change.model_copy(update={"p": p_values.get(change.label)}) for change in changes]
