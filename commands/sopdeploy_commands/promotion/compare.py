"""`sopdeploy compare`: compare two bundles on the same photographs, with the server's code.

What decides is the uniform sample of the recent traffic. A class that only the second bundle
has counts as the sample has it; the other classes are then tested alone
(`sopdeploy.evaluation.permission`). So is the best bundle that was live before, the anchor:
many bundles that each lose a little would otherwise lose much.

Photographs that a bundle was trained on are left out: `Origin.sample` has their hashes.
Near-duplicates are not independent; only the first of a group counts. Letters: N photographs, C
classes.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypedDict

import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.bundle.live import LOG, read_log
from sopdeploy.cli.command import command
from sopdeploy.cli.console import err, plain_text, print_table, say
from sopdeploy.config import OtherVersionError, StrictModel, Text, validate_format
from sopdeploy.errors import ConfigError, DataError, amount, shorten
from sopdeploy.evaluation.metrics import Rate, log_loss
from sopdeploy.evaluation.permission import (
    MIN_IMAGES,
    TOLERANCE,
    Counts,
    Rule,
    rule_of_all,
    rule_of_old,
)
from sopdeploy.evaluation.statistics import (
    ALPHA,
    TESTABLE,
    Verdict,
    difference_interval,
    holm,
    mcnemar,
    smallest_difference,
)
from sopdeploy.html.report import percent
from sopdeploy.names import LinkPath
from sopdeploy.photos.copies import MAX_SIGNATURES, group_photographs
from sopdeploy.photos.files import KEPT_NAME
from sopdeploy.photos.folder import open_evaluation_images, open_unknown
from sopdeploy.photos.photo import ImageFiles
from sopdeploy.project import SAMPLED, Time
from sopdeploy_commands.bundles.scores import logits_of_images
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.settings import Settings, load_settings

Tolerance = Annotated[float, pydantic.Field(ge=0, le=50)]  # percentage points
FEW = 5  # photographs of a class, which tell whether it is worse only if nearly all change
RECENT_DAYS = 14  # before the newest photograph that a server kept
MIN_RECENT = 100  # photographs that decide, if there are as many


class BundleScore(StrictModel):
    """Scores of one bundle: accuracy on the recent photographs, `top1`, and on all of them, `top1_all`.

    Log loss and the share of known images are those of recent photographs of classes that both
    bundles have; `rejected` is that of unknown images, if there are any.
    """

    bundle: str
    id: str
    top1: Rate
    top1_all: Rate | None = None
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


class Check(StrictModel):
    """A bound on what the second bundle loses, as fractions: it passes if `low` is at least `limit`.

    `of` are all recent photographs, those of `old` classes, which the first bundle has, or all
    recent ones compared with the `anchor`, the best bundle that was live before.
    """

    of: Literal["all", "old", "anchor"]
    num_images: int
    wins: int
    losses: int
    difference: float
    low: float
    limit: float
    num_more_images: int | None = None

    @property
    def passes(self) -> bool:
        """Whether a difference below the limit is unlikely."""
        return self.low >= self.limit

    @property
    def figures(self) -> str:
        """The difference, its bound and the limit, in points."""
        return (
            f"{100 * self.difference:+.1f} points "
            f"(at least {100 * self.low:+.1f}, limit {100 * self.limit:+.1f})"
        )


class BundleComparison(StrictModel):
    """The second bundle compared with the first on `num_images` recent photographs.

    Accuracies and differences are fractions. `classes` are those of the first bundle, `new` and
    `removed` those of the second or the first bundle only. `num_copies` near-duplicates, those
    of unknown images included, and `trained_on` training images were left out. `suspects` are
    bundles some of whose training images were found, but whose record of them is incomplete.
    `attempt` counts the comparisons of `promote` with this first bundle, and includes this one.
    `checks` decide; a comparison of before 0.2 has none. `num_more_images` would decide what is
    undecided, in the next attempt. `unknown` is None without unknown images; a second bundle
    that rejects fewer of them is worse.
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
    checks: tuple[Check, ...] = ()
    verdict: Verdict
    num_more_images: int | None
    unknown: Change | None
    classes: tuple[ClassChange, ...]
    new: tuple[ClassChange, ...]
    removed: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def passes(self) -> bool:
        """Whether the second bundle may replace the first."""
        return self.verdict in {"better", "not worse"}

    @property
    def summary(self) -> str:
        """The verdict and what it follows from, in one line."""
        if self.first.id == self.second.id:
            return f"no difference, both are the same bundle: {self._figures}"
        if self.passes:
            return f"passes: {self._figures}"
        return f"{'; '.join([self.verdict, *self._problems])}: {self._figures}"

    @property
    def _problems(self) -> Iterator[str]:
        """What speaks against the second bundle, the failed checks first."""
        of = {
            "all": "",
            "old": "the classes of both ",
            "anchor": "than the best earlier bundle ",
        }
        for check in self.checks:
            if not check.passes:
                if check.num_images < MIN_IMAGES:
                    yield f"{of[check.of]}{amount(check.num_images, 'photograph')}, too few"
                    continue
                loss = -100 * check.low
                limit = -100 * check.limit
                yield f"{of[check.of]}may lose up to {loss:.1f} points, the limit is {limit:.1f}"

        if self.num_more_images is not None:
            rounded = float(f"{self.num_more_images:.1e}")  # to two digits
            yield f"label about {rounded:,.0f} more to decide"
        if self.unknown is not None and self.unknown.is_worse:
            yield f"rejects {self.unknown.losses - self.unknown.wins} fewer unknown images"

    @property
    def _figures(self) -> str:
        """The differences on all photographs, on old classes and on new ones."""
        right = self.second.top1.right
        live = self.first.top1.right
        checks = {check.of: check for check in self.checks}
        text = (
            f"of {self.num_images:,} recent photographs {right:,} right, the live one {live:,}"
        )

        # Only what the comparison has: old classes, new ones, an earlier bundle, earlier
        # attempts.
        if "all" in checks:
            text += f": {checks['all'].figures}"
        if "old" in checks:
            text += f"; classes of both {checks['old'].figures}"
        for change in self.new:
            text += f"; new class {change.label} {change.second} of {change.num_images}"
        if "anchor" in checks:
            text += f"; to the best earlier bundle {checks['anchor'].figures}"

        return text if self.attempt < 2 else f"{text}; attempt {self.attempt}"

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
    None for the first bundle; `comparison` is None if nothing was compared. `anchor` is the best
    bundle after this move; None in the records of before 0.2.
    """

    time: Time
    user: Text
    link: LinkPath
    before: LinkPath | None
    after: LinkPath
    reason: Text
    refused: bool = False
    comparison: BundleComparison | None = None
    anchor: LinkPath | None = None


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

    # The classes of both bundles; p values are corrected for their number.
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
        say(f"new class {change.label}: {change.second} of {change.num_images} correct")
    if result.removed:
        say(f"only in the first bundle: {', '.join(result.removed)}")
    say(
        f"left out: {result.num_copies} near-duplicates, {result.trained_on} photographs from the training",
        f"better on {result.wins}, worse on {result.losses} photographs, McNemar p {result.p:.2g}",
        result.evidence,
    )

    # Accuracy on recent photographs and, if there are older ones, on all.
    for score in (result.first, result.second):
        if score.top1_all is not None:
            say(
                f"accuracy on recent traffic, {score.bundle}: {percent(score.top1.share)} on "
                f"{score.top1.count:,} photographs; on all {score.top1_all.count:,}: "
                f"{percent(score.top1_all.share)}"
            )

    say(result.summary, style="bold")


@command(_show, options={"data"})
def compare(
    first: Path,
    second: Path,
    data: Path,
    *,
    unknown: Path | None = None,
    tolerance: Tolerance = TOLERANCE,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> BundleComparison:
    """Say whether a bundle is better than another one, not worse, or worse, on the same photographs.

    The recent photographs decide: those that a server kept in the last 14 days, at least 100,
    and those of others. Training images and near-duplicates are left out; so are folders that
    are no class of either bundle, with a note.

    Example: sopdeploy compare bundles/photos-3f6c01d2a4b7 bundles/latest --data held-out

    Args:
        first: A bundle, such as the live one.
        second: The bundle to compare with it.
        data: Folder of images that neither was trained on, DIR/<class>/*.jpg.
        unknown: Folder of images of none of the classes, which test `known`; of those that a server kept,
            only the uniform sample counts.
        tolerance: Points of accuracy that the second bundle may lose on 100 photographs; half with ten times as many.
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
        anchor=load_anchor(first, settings),
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
    anchor: LoadedModel | None = None,
    on_image: Callable[[int, int], None],
) -> BundleComparison:
    """Compare the two bundles of *pair* as `compare` does, after *num_earlier* comparisons.

    The second one is also compared with the *anchor*, the best bundle that was live before.
    """
    # Both bundles must answer with one class per photograph.
    for model in pair:
        if model.bundle.manifest.rules.is_multi_label:
            raise ConfigError(
                f"{model.bundle.name}: predicts several classes per image; use `sopdeploy eval`"
            )
    models = [*pair] if anchor is None else [*pair, anchor]

    # A photograph's target is an index in the labels of both bundles.
    notes: list[str] = []
    first_labels, second_labels = (set(model.bundle.labels) for model in pair)
    all_labels = tuple(sorted(first_labels | second_labels))
    all_images = open_evaluation_images(data, all_labels, other_classes=True, log=notes.append)
    images, left_out = _leave_out_seen(all_images, models, notes)
    labels = images.labels
    targets_N = images.targets.astype(np.int64)

    # What decides: recent photographs; those of old classes again, alone.
    recent_N = _are_recent(images)
    is_old_C = np.array([label in first_labels for label in labels])
    is_common_C = np.array([label in first_labels & second_labels for label in labels])
    old_N = is_old_C[targets_N]
    common_N = recent_N & is_common_C[targets_N]
    if not common_N.any():
        raise DataError(f"{data}: no photograph of a class of both bundles remains; add some")

    # Unknown images, of which near-duplicates count once.
    unknown_images: ImageFiles | None = None
    if unknown is not None:
        unknown_images, note = open_unknown(unknown)
        if note:
            notes.append(note)
    if unknown_images is not None:
        are_first = _are_first(group_photographs(unknown_images).groups)
        left_out["num_copies"] += int((~are_first).sum())
        unknown_images = unknown_images.select(are_first)

    # Run all bundles on the same photographs; the progress counts every prediction.
    num_unknown = 0 if unknown_images is None else len(unknown_images)
    total = len(models) * len(images) + len(pair) * num_unknown  # predictions
    done = itertools.count(1)
    shared = (images, recent_N, common_N)
    options = (settings, lambda: on_image(next(done), total))
    first = _evaluate(pair[0], *shared, unknown_images, *options)
    second = _evaluate(pair[1], *shared, unknown_images, *options)

    # Three bounds: on all recent photographs, on those of old classes, and to the anchor.
    attempt = num_earlier + 1
    rule = rule_of_all(tolerance, attempt)
    next_rule = rule_of_all(tolerance, attempt + 1)
    checks = [_check("all", rule, next_rule, first.right, second.right, recent_N)]
    if (recent_N & ~old_N).any():
        rule_old = rule_of_old(tolerance)
        old = recent_N & old_N
        checks.append(_check("old", rule_old, rule_old, first.right, second.right, old))
    if anchor is not None:
        best = _evaluate(anchor, *shared, None, *options)
        checks.append(_check("anchor", rule, next_rule, best.right, second.right, recent_N))

    # What changed for unknown images, if both bundles recognize them.
    rejections: Change | None = None
    if first.rejected is not None and second.rejected is not None:
        counts = _count_changes(first.rejected, second.rejected)
        rejections = Change(**counts, p=mcnemar(**counts))

    # The verdict, and how many more photographs would decide an undecided comparison.
    in_all = checks[0]
    verdict = _decide(checks, rejections)
    num_more_images: int | None = None
    if verdict == "undecided":
        failed = [check.num_more_images for check in checks if not check.passes]
        if None not in failed:
            num_more_images = max(count for count in failed if count is not None)
    old_classes, new_classes = (
        compare_classes(labels, targets_N[mask], first.right[mask], second.right[mask])
        for mask in (recent_N & old_N, recent_N & ~old_N)
    )
    interval = difference_interval(in_all.wins, in_all.losses, in_all.num_images)
    return BundleComparison(
        first=first.score,
        second=second.score,
        num_images=in_all.num_images,
        **left_out,
        wins=in_all.wins,
        losses=in_all.losses,
        difference=in_all.difference,
        low=interval.low,
        high=interval.high,
        p=mcnemar(in_all.wins, in_all.losses),
        tolerance=tolerance / 100,
        attempt=attempt,
        checks=checks,
        verdict=verdict,
        num_more_images=num_more_images,
        unknown=rejections,
        classes=old_classes,
        new=new_classes,
        removed=sorted(first_labels - second_labels),
        notes=notes,
    )


def _check(
    of: Literal["all", "old", "anchor"],
    rule: Rule,
    next_rule: Rule,
    first_N: NDArray[np.bool_],
    second_N: NDArray[np.bool_],
    counted_N: NDArray[np.bool_],
) -> Check:
    """Bound what is lost on the photographs *counted_N*, with *next_rule* at the next attempt."""
    changes = _count_changes(first_N[counted_N], second_N[counted_N])
    counts = Counts(int(counted_N.sum()), changes["wins"], changes["losses"])
    bound = rule.bound(counts)

    return Check(
        of=of,
        num_images=counts.images,
        **changes,
        difference=bound.difference,
        low=bound.low,
        limit=bound.limit,
        num_more_images=next_rule.labels_to_pass(counts),
    )


def _decide(checks: Sequence[Check], unknown: Change | None) -> Verdict:
    """Decide by *checks*, of which the first is that of all photographs, and *unknown* images."""
    if unknown is not None and unknown.is_worse:  # even if it is better on the photographs
        return "worse"
    if all(check.passes for check in checks):
        in_all = checks[0]

        is_better = in_all.wins > in_all.losses
        if is_better and mcnemar(in_all.wins, in_all.losses) <= ALPHA:
            return "better"
        return "not worse"
    for check in checks:
        if check.losses > check.wins and mcnemar(check.wins, check.losses) <= ALPHA:
            return "worse"
    return "undecided"


def _are_recent(images: ImageFiles) -> NDArray[np.bool_]:
    """Return the mask (N,) of recent *images*: those of the last `RECENT_DAYS`, at least `MIN_RECENT`.

    A label keeps the time of the file, at which a server kept it. The newest one counts as
    today. Photographs that no server kept have no such time, and are recent.
    """
    paths = [images.path(index) for index in range(len(images))]
    is_kept_N = np.array([KEPT_NAME.fullmatch(path.name) is not None for path in paths])
    times_N = np.array([path.stat().st_mtime for path in paths])

    kept_times = np.sort(times_N[is_kept_N])[::-1]  # the newest first
    if len(kept_times) <= MIN_RECENT:
        return np.ones(len(images), np.bool_)
    since = min(kept_times[0] - 86_400 * RECENT_DAYS, kept_times[MIN_RECENT - 1])
    return ~is_kept_N | (times_N >= since)


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
    different = set()
    live = read_link(link)
    if live is None:
        return 0

    for promotion in read_promotions(link):
        compared = promotion.comparison
        if promotion.before == live and compared is not None:
            different.add(
                (promotion.after, compared.num_images, compared.wins, compared.losses)
            )

    return len(different)


def read_anchor(link: Path) -> str | None:
    """Read the best bundle that was live before the one that *link* leads to; None without another one.

    A bundle that was moved to without a comparison, by force or as the first one, is the best.
    """
    live = read_link(link)
    if live is None:
        return None
    moves = [move for move in read_promotions(link) if move.after == live and not move.refused]
    if not moves or moves[-1].anchor == live:
        return None
    return moves[-1].anchor


def load_anchor(link: Path, settings: Settings) -> LoadedModel | None:
    """Load the bundle of `read_anchor`; None without one, or if it was deleted."""
    anchor = read_anchor(link)
    if anchor is None or not (link.parent / anchor).exists():
        return None
    return load_model(link.parent / anchor, settings)


class LeftOut(TypedDict):
    """The fields of `BundleComparison` about photographs that are not compared."""

    num_copies: int
    trained_on: int
    suspects: list[str]


def _leave_out_seen(
    images: ImageFiles, models: Sequence[LoadedModel], notes: list[str]
) -> tuple[ImageFiles, LeftOut]:
    """Leave out training images of the bundles with their near-duplicates, and copies among the others.

    Also returns what was left out. A suspect is a bundle that was trained on some of the
    images, and whose record is full: it may have seen more of them.
    """
    grouped = group_photographs(images)

    # A record has the hashes of at most `SAMPLED` training images; a full one may lack others.
    recorded_N = np.zeros(len(images), np.bool_)  # whether the record of a bundle has the file
    suspects = []
    for model in models:
        name = model.bundle.name
        origin = model.bundle.manifest.origin
        if origin is None or not origin.sample:
            notes.append(
                f"{name}: its training images are not recorded; leave them out yourself"
            )
            continue
        of_bundle_N = np.isin(grouped.file_hashes, origin.sample)
        recorded_N |= of_bundle_N
        if of_bundle_N.any() and len(origin.sample) == SAMPLED:
            suspects.append(name)

    # Near-duplicates share a group; of each group, one photograph counts.
    if len(images) > MAX_SIGNATURES:
        notes.append(
            f"{images.root}: over {MAX_SIGNATURES:,} images; only equal files are left out"
        )
    group_N = grouped.groups  # equal for near-duplicates
    # Also the near-duplicates of recorded images
    trained_on_N = np.isin(group_N, group_N[recorded_N])
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
    # The index of the first image of each of G groups
    _, first_G = np.unique(group_N, return_index=True)
    return np.isin(np.arange(len(group_N)), first_G)


class Evaluated(NamedTuple):
    """A bundle's score, which photographs (N,) are `right`, and which unknown images (U,) are `rejected`."""

    score: BundleScore
    right: NDArray[np.bool_]
    rejected: NDArray[np.bool_] | None


def _evaluate(
    loaded: LoadedModel,
    images: ImageFiles,
    recent_N: NDArray[np.bool_],
    common_N: NDArray[np.bool_],
    unknown: ImageFiles | None,
    settings: Settings,
    on_image: Callable[[], None],
) -> Evaluated:
    """Run a bundle on *images* and, if given, *unknown* ones.

    It is scored on those of the mask *recent_N*. Those of *common_N*, whose classes both bundles
    have, give the log loss and the share of known images.
    """
    bundle = loaded.bundle
    labels = images.labels
    logits_NC, known_N = _predict_known(loaded, images, settings, on_image)
    rejected = None  # or a mask (U,)
    if unknown is not None:
        _, known_U = _predict_known(loaded, unknown, settings, on_image)
        rejected = ~known_U

    # A class has two numbers: its target, the index in *labels*, and its output, the index in
    # the bundle. The anchor may have classes that neither bundle of the pair has.
    answers = [bundle.labels[output] for output in logits_NC.argmax(axis=1)]
    labels_N = [labels[target] for target in images.targets]
    right_N = np.array(
        [answer == label for answer, label in zip(answers, labels_N, strict=True)]
    )
    outputs = {label: output for output, label in enumerate(bundle.labels)}
    has_class_N = np.array([label in outputs for label in labels_N])
    scored_N = common_N & has_class_N
    outputs_K = np.array([outputs[labels_N[index]] for index in np.flatnonzero(scored_N)])
    loss = log_loss(logits_NC[scored_N].astype(np.float64), outputs_K)

    # Shares of the recent photographs, and what the rejection does, if there is a rule.
    has_rule = bundle.manifest.rules.rejection is not None
    score = BundleScore(
        bundle=bundle.name,
        id=bundle.manifest.id,
        top1=Rate.of(int(right_N[recent_N].sum()), int(recent_N.sum())),
        top1_all=Rate.of(int(right_N.sum()), len(right_N)),
        log_loss=loss,
        accepted=Rate.of(int(known_N[common_N].sum()), int(common_N.sum()))
        if has_rule
        else None,
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
        first = first_N[targets_N == target]
        second = second_N[targets_N == target]
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
