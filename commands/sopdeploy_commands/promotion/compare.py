"""`sopdeploy compare`: compare two bundles on the same photographs, with the server's code.

What decides is the uniform sample of the recent traffic. A class that only the second bundle
has counts as the sample has it; the other classes are then tested alone
(`sopdeploy.evaluation.permission`). Letters: N photographs, C classes.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle
from sopdeploy.cli.command import command
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.metrics import Rate, log_loss
from sopdeploy.evaluation.permission import (
    TOLERANCE,
    Counts,
    Rule,
    rule_of_all,
    rule_of_old,
)
from sopdeploy.evaluation.statistics import (
    ALPHA,
    Verdict,
    difference_interval,
    mcnemar,
)
from sopdeploy.photos.photo import ImageFiles
from sopdeploy_commands.bundles.scores import logits_of_images
from sopdeploy_commands.promotion.comparison import (
    BundleComparison,
    BundleScore,
    Change,
    Check,
    ClassChange,
    Period,
    count_needed,
    show_comparison,
)
from sopdeploy_commands.promotion.history import count_comparisons
from sopdeploy_commands.promotion.photographs import (
    Photographs,
    open_different_unknown,
    select_photographs,
)
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.settings import Settings, load_settings

Tolerance = Annotated[float, pydantic.Field(ge=0, le=50)]  # percentage points
NEWEST = 30  # photographs whose accuracy is told


@command(
    show_comparison,
    options={"data"},
    examples=("sopdeploy compare bundles/photos-3f6c01d2a4b7 bundles/latest --data held-out",),
)
def compare(
    first: Path,
    second: Path,
    data: Path,
    *,
    unknown: Path | None = None,
    tolerance: Tolerance = TOLERANCE,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> BundleComparison:
    """Say whether the second bundle is better than the first one, not worse, or worse, on the same photos.

    Of the photos that a server kept, the last 14 days count or, if `label` has noted a drift alarm in
    the folder, the time since it began. In both cases, at least the newest 100 photos count. Photos
    that no server kept all count. Training images, near-duplicates and folders that are not a class of
    either bundle are left out.

    Args:
        first: A bundle, such as the live one.
        second: The bundle to compare with it.
        data: Folder of images that neither bundle was trained on, DIR/<class>/*.jpg.
        unknown: Folder of images of none of the classes, which test `known`. Of images that a server kept,
            only the uniform sample counts.
        tolerance: Points of accuracy that the second bundle may lose on 100 photos, and two thirds as many on 1,000.
        on_image: Called with the numbers of predictions done and in total.

    Raises:
        DataError: An image that cannot be decoded within the limits of a server, or no photo of a common
            class remains.
        ConfigError: A bundle predicts several classes per image.
        BundleError: A bundle is damaged.
    """
    settings = load_settings()

    # The folders to which the links lead: without this, `load_model` would take `latest` for the
    # live bundle of the project, which is what new bundles are compared with.
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
    """Compare the two bundles of *pair* as `compare` does, after *num_earlier* comparisons with the first one."""
    # Both bundles must answer with one class per photograph.
    for model in pair:
        if model.bundle.manifest.rules.is_multi_label:
            raise ConfigError(
                f"{model.bundle.name}: predicts several classes per image; use `sopdeploy eval`"
            )

    # The photographs, and unknown images.
    notes: list[str] = []
    photographs, left_out = select_photographs(data, pair, notes)
    unknown_images: ImageFiles | None = None
    if unknown is not None:
        unknown_images, num_copies = open_different_unknown(unknown, notes)
        left_out["num_copies"] += num_copies

    first, second = _evaluate_pair(pair, photographs, unknown_images, settings, on_image)

    # The verdict, by bounds on what the second bundle loses and by what changed for unknown images,
    # if both bundles recognize them.
    attempt = num_earlier + 1
    checks = _bound_losses(photographs, first, second, tolerance, attempt)
    rejections = _compare_rejections(first, second)
    verdict = _decide(checks, rejections)
    needed = count_needed(checks) if verdict == "undecided" else None

    # The figures are those of all recent photographs.
    in_all = checks[0]
    interval = difference_interval(in_all.wins, in_all.losses, in_all.num_images)
    first_labels, second_labels = (set(model.bundle.labels) for model in pair)
    new = compare_classes(photographs, photographs.new, first.right, second.right)
    unseen = second_labels - first_labels - {change.label for change in new}
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
        num_more_images=needed.num_images if needed and needed.decides else None,
        unknown=rejections,
        classes=compare_classes(photographs, photographs.old, first.right, second.right),
        new=new,
        unseen=sorted(unseen),
        removed=sorted(first_labels - second_labels),
        notes=notes,
        changed_at=photographs.changed_at,
        periods=_list_periods(photographs, first.right, second.right),
    )


def _evaluate_pair(
    pair: Sequence[LoadedModel],
    photographs: Photographs,
    unknown_images: ImageFiles | None,
    settings: Settings,
    on_image: Callable[[int, int], None],
) -> list["Evaluated"]:
    """Run both bundles on the same photographs and, if there are any, unknown images; score each.

    *on_image* receives how many predictions are done, and how many there are of both bundles.
    """
    num_unknown = 0 if unknown_images is None else len(unknown_images)
    num_predictions = len(pair) * (len(photographs.images) + num_unknown)
    numbers = itertools.count(1)

    def answer(model: LoadedModel, images: ImageFiles) -> Answers:
        return _answer(
            model, images, settings, lambda: on_image(next(numbers), num_predictions)
        )

    return [
        _evaluate(
            model.bundle,
            photographs,
            answer(model, photographs.images),
            None if unknown_images is None else answer(model, unknown_images),
        )
        for model in pair
    ]


def _compare_rejections(first: "Evaluated", second: "Evaluated") -> Change | None:
    """Count which unknown images only one of the bundles rejects; None unless both recognize them."""
    if first.rejected is None or second.rejected is None:
        return None
    counts = _count_changes(first.rejected, second.rejected)
    return Change(**counts, p=mcnemar(**counts))


def _bound_losses(
    photographs: Photographs,
    first: "Evaluated",
    second: "Evaluated",
    tolerance: float,
    attempt: int,
) -> list[Check]:
    """Bound what the *second* bundle loses to the *first* one on all recent photographs.

    With new classes, the old ones are also checked alone.
    """
    # What is labelled now is counted by the next attempt, whose rule is stricter.
    rule, next_rule = (rule_of_all(tolerance, number) for number in (attempt, attempt + 1))
    recent_N = photographs.recent
    checks = [_check("all", rule, next_rule, first.right, second.right, recent_N)]

    if photographs.new.any():
        rule = rule_of_old(tolerance)
        checks.append(_check("old", rule, rule, first.right, second.right, photographs.old))
    return checks


def _check(
    of: Literal["all", "old"],
    rule: Rule,
    next_rule: Rule,
    first_N: NDArray[np.bool_],
    second_N: NDArray[np.bool_],
    counted_N: NDArray[np.bool_],
) -> Check:
    """Bound by *rule* what the second bundle loses on the photographs that *counted_N* marks.

    *first_N* and *second_N* mark those that the bundles classify correctly. By *next_rule*, more
    photographs would be counted.
    """
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
        wins_more = in_all.wins > in_all.losses
        is_better = wins_more and mcnemar(in_all.wins, in_all.losses) <= ALPHA
        return "better" if is_better else "not worse"

    # Old classes may lose a little beside a new one: what passes its own limit is no reason.
    for check in checks:
        loses_more = check.losses > check.wins
        if not check.passes and loses_more and mcnemar(check.wins, check.losses) <= ALPHA:
            return "worse"
    return "undecided"


def _list_periods(
    photographs: Photographs, first_N: NDArray[np.bool_], second_N: NDArray[np.bool_]
) -> list[Period]:
    """Count what both bundles get right since a change, among the newest photographs, and by week.

    *first_N* and *second_N* mark the photographs that they classify correctly. Without a
    photograph that a server kept, there are no periods, except that of a change.
    """
    times_N = photographs.times
    kept = np.flatnonzero(times_N > 0)
    parts: list[tuple[str, NDArray[np.intp]]] = []
    if photographs.changed_at is not None:
        is_since = times_N[kept] >= photographs.changed_at.timestamp()
        parts.append(("since the traffic changed", kept[is_since]))

    if len(kept):
        newest_first = kept[np.argsort(-times_N[kept], kind="stable")]
        parts.append(("newest photos", newest_first[:NEWEST]))

    # Weeks begin on Mondays.
    weeks: dict[str, list[int]] = {}
    for index in kept[np.argsort(times_N[kept], kind="stable")].tolist():
        day = datetime.fromtimestamp(times_N[index], UTC).date()
        monday = day - timedelta(days=day.weekday())
        weeks.setdefault(f"week of {monday}", []).append(index)
    parts += [(name, np.asarray(indexes)) for name, indexes in weeks.items()]

    return [
        Period(
            of=name,
            num_images=len(part),
            first=int(first_N[part].sum()),
            second=int(second_N[part].sum()),
        )
        for name, part in parts
    ]


class Answers(NamedTuple):
    """The calibrated logits (N, C) of a bundle for N images, and which images (N,) are `known`.

    Without a threshold, all are.
    """

    logits: NDArray[np.floating]
    known: NDArray[np.bool_]


class Evaluated(NamedTuple):
    """A bundle's score, which photographs (N,) are `right`, and which unknown images (U,) are `rejected`."""

    score: BundleScore
    right: NDArray[np.bool_]
    rejected: NDArray[np.bool_] | None


def _answer(
    loaded: LoadedModel, images: ImageFiles, settings: Settings, on_image: Callable[[], None]
) -> Answers:
    """Run a bundle on *images*."""
    logits_NC = logits_of_images(loaded, images, settings, on_image)
    rules = loaded.bundle.manifest.rules
    known = [rules.answer(row, top_k=1).known is not False for row in logits_NC]
    return Answers(rules.calibrate(logits_NC), np.array(known))


def _find_right(bundle: Bundle, images: ImageFiles, answers: Answers) -> NDArray[np.bool_]:
    """Find out which of *images* (N,) have the class that *bundle* answers.

    Classes are compared by name: the index of one in the bundle differs from that in the labels
    of the images.
    """
    answers_N = [bundle.labels[output] for output in answers.logits.argmax(axis=1)]
    labels_N = [images.labels[target] for target in images.targets]
    return np.array(
        [answer == label for answer, label in zip(answers_N, labels_N, strict=True)]
    )


def _evaluate(
    bundle: Bundle, photographs: Photographs, answers: Answers, for_unknown: Answers | None
) -> Evaluated:
    """Score a bundle of the pair by its *answers* for *photographs* and, if there are any, for unknown images.

    Log loss and the share of known images are those of the recent photographs whose class both
    bundles have.
    """
    right_N = _find_right(bundle, photographs.images, answers)

    # The log loss, of the `common` photographs.
    output_of_label = {label: output for output, label in enumerate(bundle.labels)}
    labels_N = [photographs.images.labels[target] for target in photographs.images.targets]
    common = photographs.common
    outputs = np.array([output_of_label[labels_N[index]] for index in np.flatnonzero(common)])
    loss = log_loss(answers.logits[common].astype(np.float64), outputs)

    # What the rejection does with known and with unknown images, if there is a rule.
    rejected_U = None if for_unknown is None else ~for_unknown.known
    accepted: Rate | None = None
    rejected: Rate | None = None
    if bundle.manifest.rules.rejection is not None:
        accepted = _share(answers.known[common])
        if rejected_U is not None:
            rejected = _share(rejected_U)

    score = BundleScore(
        bundle=bundle.name,
        id=bundle.manifest.id,
        top1=_share(right_N[photographs.recent]),
        log_loss=loss,
        accepted=accepted,
        rejected=rejected,
    )
    return Evaluated(score, right_N, rejected_U)


def _share(mask: NDArray[np.bool_]) -> Rate:
    """Return how many of the images of *mask* (N,) it marks, as a rate."""
    return Rate.of(int(mask.sum()), len(mask))


def _count_changes(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> dict[str, int]:
    """Count the images that only the *second* bundle answers correctly, `wins`, or the *first*, `losses`."""
    return {"wins": int((second & ~first).sum()), "losses": int((first & ~second).sum())}


def compare_classes(
    photographs: Photographs,
    counted_N: NDArray[np.bool_],
    first_N: NDArray[np.bool_],
    second_N: NDArray[np.bool_],
) -> list[ClassChange]:
    """Compare the two bundles in each class of the photographs *counted_N*.

    *first_N* and *second_N* mark the photographs that they classify correctly.
    """
    targets_N = photographs.images.targets
    changes = []
    for target in np.unique(targets_N[counted_N]).tolist():
        of_class_N = counted_N & (targets_N == target)
        first = first_N[of_class_N]
        second = second_N[of_class_N]
        counts = _count_changes(first, second)
        change = ClassChange(
            label=photographs.images.labels[target],
            num_images=len(first),
            first=int(first.sum()),
            second=int(second.sum()),
            **counts,
            p=mcnemar(**counts),
        )
        changes.append(change)
    return changes
