"""The result of a comparison of two bundles: its figures, and how they are told."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import pydantic

from sopdeploy.cli.console import err, plain_text, print_table, say
from sopdeploy.config import StrictModel
from sopdeploy.errors import amount, shorten
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.permission import (
    MIN_IMAGES,
    MIN_TOLERANCE_IMAGES,
    Counts,
    proves_class_loss,
)
from sopdeploy.evaluation.statistics import ALPHA, Verdict
from sopdeploy.html.report import percent

LABELS_PER_DECIDING = 2.5  # by the turns of the label page of 0.3.0


class BundleScore(StrictModel):
    """Scores of one bundle: `top1` is the accuracy on the recent photographs.

    `log_loss` and `accepted`, the share of known images, are those of recent photographs whose
    class both bundles have. `rejected` is the share of unknown images that are rejected, if
    there are any.
    """

    bundle: str
    id: str
    top1: Rate
    log_loss: float
    accepted: Rate | None
    rejected: Rate | None


class Change(StrictModel):
    """Images that only the second bundle answers correctly (`wins`), or only the first (`losses`).

    `p` is McNemar's exact p-value. The correct answer for an unknown image is that it is
    unknown.
    """

    wins: int
    losses: int
    p: float | None = None

    @property
    def is_worse(self) -> bool:
        """Whether the second bundle is worse on these images."""
        return self.p is not None and self.p <= ALPHA and self.losses > self.wins


class ClassChange(Change):
    """One class; `p` is not corrected for the number of classes, but `proves_class_loss` is."""

    label: str
    num_images: int
    first: int
    second: int


class Check(StrictModel):
    """A bound on what the second bundle loses, as fractions: it passes if `low` is at least `limit`.

    `of` says what is compared:

    - `all`: with the first bundle, on all recent photographs,
    - `old`: with the first bundle, on recent photographs of classes that it has,
    - `anchor`: in records of 0.2, with the best bundle that was live before.
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
        """Whether a difference below `limit` is unlikely."""
        return self.low >= self.limit

    @property
    def problem(self) -> str:
        """Why it does not pass."""
        images = "classes of both: " if self.of == "old" else ""
        if self.num_images < MIN_IMAGES:
            return f"{images}{amount(self.num_images, 'photo')}, fewer than {MIN_IMAGES}"
        loss = -100 * self.low  # the largest one that is not unlikely
        limit = -100 * self.limit
        return f"{images}may lose up to {loss:.1f} points, the limit is {limit:.1f}"

    @property
    def figures(self) -> str:
        """The difference, its bound and the limit, in points; few photos give no useful bound."""
        if self.num_images < MIN_IMAGES:
            return f"{100 * self.difference:+.1f} points"
        return (
            f"{100 * self.difference:+.1f} points "
            f"(at least {100 * self.low:+.1f}, limit {100 * self.limit:+.1f})"
        )


class Needed(NamedTuple):
    """Photographs that would probably decide or, without *decides*, tell whether more of them can."""

    num_images: int
    decides: bool

    @property
    def num_labels(self) -> int:
        """How many photos to label, of which only some decide; two digits."""
        return math.ceil(float(f"{LABELS_PER_DECIDING * self.num_images:.1e}"))

    @property
    def line(self) -> str:
        """What to do."""
        purpose = "to decide" if self.decides else "to see whether labels can help"
        return f"label about {self.num_labels:,} more {purpose}, two fifths of which count here"


def count_needed(checks: Sequence[Check]) -> Needed | None:
    """Estimate how many more photographs all *checks* need; None if no number is enough for one.

    With fewer than `MIN_TOLERANCE_IMAGES`, two wins or losses change the difference by several
    points, so what is missing to that number is needed first.
    """
    failed = [check for check in checks if not check.passes]
    missing = [
        check.num_more_images or max(0, MIN_TOLERANCE_IMAGES - check.num_images)
        for check in failed
    ]
    if not all(missing):
        return None
    return Needed(max(missing), decides=all(check.num_more_images for check in failed))


class Period(StrictModel):
    """Photographs of a time, `of`, and how many of them the first and the second bundle get right."""

    of: str
    num_images: int
    first: int
    second: int

    @property
    def line(self) -> str:
        """The figures in one line, in the words of `BundleComparison.summary`."""
        return (
            f"{self.of}: of {amount(self.num_images, 'photo')} {self.second:,} right, "
            f"the live one {self.first:,}"
        )


class BundleComparison(StrictModel):
    """The second bundle compared with the first on `num_images` recent photographs.

    Accuracies and differences are fractions. `classes` are the classes of the first bundle, `new` are
    in the second bundle only, `removed` in the first one only, and `unseen` are new classes of which
    no recent photograph is there. Left out were `num_copies` near-duplicates, also of unknown images,
    and `trained_on` photographs, the number of training images and their near-duplicates.
    `attempt` counts the comparisons of `promote` with this first bundle, and includes this one.
    `checks` decide; a comparison of before 0.2 has none. `num_more_images` would probably decide
    what is undecided. `unknown` is None without unknown images; a second
    bundle that rejects significantly fewer of them is worse.
    `changed_at` is when the traffic changed, if `label` has noted it: `periods` begins with the
    photographs since then. The other periods are the newest photographs and weeks.
    """

    first: BundleScore
    second: BundleScore
    num_images: int
    num_copies: int
    trained_on: int
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
    unseen: tuple[str, ...] = ()
    notes: tuple[str, ...]
    changed_at: pydantic.AwareDatetime | None = None
    periods: tuple[Period, ...] = ()

    @property
    def change_problem(self) -> str:
        """Why the second bundle does not show that it has learned a change; empty without a change.

        Too few photos since the change show nothing: traffic can be so low that there are no more.
        """
        since = self.periods[0] if self.changed_at and self.periods else None
        if since is None or since.num_images < MIN_IMAGES or since.second > since.first:
            return ""
        return f"no better {self._since}: {since.line}"

    @property
    def change_note(self) -> str:
        """What is not known about a change, because there are too few photos since then; else empty."""
        if self.changed_at is None:
            return ""
        num_since = self.periods[0].num_images if self.periods else 0
        if num_since >= MIN_IMAGES:
            return ""

        # Only some of the labelled photos decide.
        num_labels = math.ceil(LABELS_PER_DECIDING * (MIN_IMAGES - num_since))
        return (
            f"only {amount(num_since, 'photo')} {self._since}: whether the bundle has learned it is not known; "
            f"label about {num_labels} more when they have come"
        )

    @property
    def _since(self) -> str:
        """When the change began, in words."""
        return f"since the traffic changed, {self.changed_at:%Y-%m-%d %H:%M} UTC"

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
        """What speaks against the second bundle, or lacks to decide; failed checks first."""
        for check in self.checks:
            if not check.passes:
                yield check.problem

        if self.verdict == "undecided" and (needed := count_needed(self.checks)):
            yield needed.line

        if self.unseen:
            classes = "class" if len(self.unseen) == 1 else "classes"
            yield (
                f"no photo shows the new {classes} {shorten(self.unseen)}, "
                "so what the new bundle gains there does not count"
            )

        losers = [change for change in self.classes if change.losses > change.wins]
        has_others = len(self.classes) + len(self.new) > 1
        if self.verdict == "worse" and losers and has_others:
            yield self._describe_exchange(losers)

        if self.unknown is not None and self.unknown.is_worse:
            yield f"rejects {self.unknown.losses - self.unknown.wins} fewer unknown images"

    def _describe_exchange(self, losers: Sequence[ClassChange]) -> str:
        """Say what the class that loses most of *losers* loses, and what the others lose or gain together."""
        loser = max(losers, key=lambda change: change.losses - change.wins)
        others = [change for change in (*self.classes, *self.new) if change is not loser]
        right = sum(change.second for change in others)
        live = sum(change.first for change in others)
        count = sum(change.num_images for change in others)
        return (
            f"{loser.label} loses most: {loser.second} of {loser.num_images} right, the live one "
            f"{loser.first}, and {right} of {count} of the others, the live one {live}"
        )

    @property
    def _figures(self) -> str:
        """The differences on all photographs, on old classes and on new ones."""
        right = self.second.top1.right
        live = self.first.top1.right
        checks = {check.of: check for check in self.checks}
        text = f"of {self.num_images:,} recent photos {right:,} right, the live one {live:,}"

        # Only what the comparison has: old classes, new ones, earlier attempts.
        if "all" in checks:
            text += f": {checks['all'].figures}"
        if "old" in checks:
            text += f"; classes of both {checks['old'].figures}"
        for change in self.new:
            text += f"; new class {change.label} {change.second} of {change.num_images}"

        return text if self.attempt < 2 else f"{text}; attempt {self.attempt}"

    @property
    def worse_classes(self) -> list[str]:
        """Classes in which the second bundle loses much."""
        return list_worse(self.classes, 100 * self.tolerance)


def list_worse(classes: Sequence[ClassChange], tolerance: float) -> list[str]:
    """Return the labels of *classes* that lose significantly, and provably much (`proves_class_loss`)."""
    return [
        change.label
        for change in classes
        if change.is_worse
        and proves_class_loss(
            Counts(change.num_images, change.wins, change.losses), tolerance, len(classes)
        )
    ]


def show_comparison(result: BundleComparison) -> None:
    """Print both bundles, their classes and the verdict."""
    for note in result.notes:
        err.print(plain_text(f"warning: {note}"))

    # Both bundles.
    score_rows = []
    for score in (result.first, result.second):
        interval = f"{percent(score.top1.low)} to {percent(score.top1.high)}"
        shares = (
            percent(rate.share) if rate else "-" for rate in (score.accepted, score.rejected)
        )
        score_rows.append(
            (
                score.bundle,
                percent(score.top1.share),
                interval,
                f"{score.log_loss:.3f}",
                *shares,
            )
        )

    print_table(
        ("bundle", "top-1", "95 %", "log loss", "known", "unknown rejected"), score_rows
    )

    # The classes of the first bundle with recent photographs, also those that the second one
    # lacks.
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

    print_table(("class", "images", "first", "second", "better, worse", "p"), class_rows)
    for change in result.new:
        say(f"new class {change.label}: {change.second} of {change.num_images} correct")
    if result.removed:
        say(f"only in the first bundle: {', '.join(result.removed)}")
    say(
        f"left out: {result.num_copies} near-duplicates, {result.trained_on} photos from the training",
        f"better on {result.wins}, worse on {result.losses} photos, McNemar p {result.p:.2g}",
    )
    for period in result.periods:
        say(period.line)
    if result.change_note:
        say(result.change_note)
    say(result.summary, style="bold")
