"""`sopdeploy promote`: lead the link that a server follows to another bundle, if the evidence allows it.

`promotions.jsonl` beside the link has one line for each move and for each attempt that was
refused. The line is on disk before the link is moved. Trying again until a bundle passes would
promote a worse one more often than stated, so each further comparison with one live bundle
needs stronger evidence (`rule_of_all`).
"""

import os
from collections.abc import Callable
from pathlib import Path

import pydantic

from sopdeploy.bundle.live import LOG
from sopdeploy.cli.command import command
from sopdeploy.cli.console import print_field, say
from sopdeploy.config import MAX_LINE, first_problem
from sopdeploy.errors import ConfigError, PromotionError, StorageError, amount, shorten
from sopdeploy.evaluation.permission import TOLERANCE
from sopdeploy.file_systems import flush, lock_file
from sopdeploy.files import (
    move_link,
    os_reason,
    target_of,
    writing,
)
from sopdeploy.photos.evaluation_images import ANY_IMAGES
from sopdeploy.photos.files import data_folder
from sopdeploy.project import utc_now
from sopdeploy_commands.promotion.compare import Tolerance, compare_loaded
from sopdeploy_commands.promotion.comparison import BundleComparison
from sopdeploy_commands.promotion.decided import train_on_decided
from sopdeploy_commands.promotion.history import (
    Promotion,
    count_comparisons,
    read_link,
    read_promotions,
)
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import load_settings


def _show(move: Promotion) -> None:
    """Print what the link leads to, and why."""
    print_field(
        move.link, f"{move.after} (before: {move.before or 'nothing'})", style="bold green"
    )
    say(move.reason)
    for note in move.comparison.notes if move.comparison else ():
        say(note)
    for period in move.comparison.periods if move.comparison else ():
        say(period.line)
    if move.comparison and move.comparison.change_note:
        say(move.comparison.change_note)
    if move.num_trained:
        say(f"{amount(move.num_trained, 'photo')} that decided will be trained on from now on")


@command(
    _show,
    options={"over", "data"},
    examples=(
        "sopdeploy promote bundles/latest --over bundles/live --data held-out",
        "sopdeploy promote --back bundles/live",
    ),
)
def promote(
    new: Path | None = None,
    over: Path | None = None,
    data: Path | None = None,
    *,
    unknown: Path | None = None,
    tolerance: Tolerance = TOLERANCE,
    force: str | None = None,
    back: Path | None = None,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> Promotion:
    """Move the link that a server follows to a new bundle, unless the accuracy may drop, and record why.

    A bundle is refused if it may lose more than the tolerance on recent photos. A bundle with new
    classes is also refused if it may lose more than twice the tolerance on photos of the old
    classes. A bundle is always refused if it lacks a class, or if a class certainly loses twice
    the tolerance. Each further attempt to replace the same bundle needs stronger evidence.
    `promotions.jsonl` next to the link records each move and each refusal.

    Before the move, the new bundle is loaded, and its hashes and outputs are checked. After the
    move, photos of a server move from PHOTOS-held-out to PHOTOS, because this decision has used
    them. Only the newest 60 stay for the next decision.

    Args:
        new: The bundle to serve.
        over: Link that the server follows; created if absent.
        data: Folder of images that neither bundle was trained on, DIR/<class>/*.jpg.
        unknown: Folder of images of none of the classes, which test `known`.
        tolerance: Points of accuracy that it may lose on 100 photos, and two thirds as many on 1,000.
        force: Reason to move the link in any case; recorded.
        back: Link to move back to the previous bundle, without other arguments. A second time undoes the first.
        on_image: Called with the numbers of predictions done and in total.

    Raises:
        PromotionError: The objections, or there is no bundle to go back to.
        ConfigError: *over* or *back* is no link, or arguments that do not fit together.
    """
    # Back to an earlier bundle, or to a new one: each with its own options.
    if back is not None and all(other is None for other in (new, over, data, unknown, force)):
        return _move_back(back)
    if new is None or over is None or back is not None:
        raise ConfigError("give NEW --over LINK, or --back LINK alone")

    # The first bundle is not compared, but a wrong folder is an error then, too.
    if data is not None:
        data_folder(data)
    if unknown is not None:
        data_folder(unknown, ANY_IMAGES)

    # If the link leads to a bundle that was deleted, `before` is set, but nothing is live.
    before = _read_target(over)
    has_live = over.exists()

    # Where a bundle is live, the new one must be compared with it, or forced.
    if has_live:
        if os.path.realpath(over) == os.path.realpath(new):
            raise ConfigError(f"{over}: leads to this bundle already; name another one")
        if data is None and force is None:
            raise ConfigError(
                "no photos to compare with", remedies={"data": "DIR", "force": "REASON"}
            )

    # A damaged bundle must not become live.
    after = target_of(over, new)
    settings = load_settings()
    loaded = load_model(over.parent / after, settings)  # raises an error for a damaged bundle
    new_name = loaded.bundle.manifest.project

    # Nothing to compare with, or a forced move without photographs
    if not has_live or data is None:
        reason = force or "first bundle"
        return _record_and_move(over, before, after, reason, comparison=None)

    # Both bundles on the same photographs.
    live = load_model(over, settings)
    comparison = compare_loaded(
        (live, loaded), data, count_comparisons(over), settings, unknown=unknown,
        tolerance=tolerance, on_image=on_image,
    )  # fmt: skip

    objections = _list_objections(comparison, live.bundle.manifest.project, new_name)

    # A refused move is recorded, too: the next comparison counts it as an attempt.
    if objections and force is None:
        _record_and_move(over, before, after, "; ".join(objections), comparison, refused=True)
        raise PromotionError(
            f"{new}: not promoted, {'; '.join(objections)}; to do it anyway, give --force REASON",
            lists={"objections": objections},
        )

    move = _record_and_move(over, before, after, force or comparison.summary, comparison)
    return move.model_copy(update={"num_trained": train_on_decided(data)})


def _move_back(link: Path) -> Promotion:
    """Move *link* back to the bundle that was live before the last move to the live one, and record it."""
    live = _read_target(link)
    moves = [move for move in read_promotions(link) if move.after == live and not move.refused]

    # The bundles before it, the oldest first; before the first bundle of all, none was live.
    previous = [move.before for move in moves if move.before]
    if not previous:
        log = link.with_name(LOG)
        raise PromotionError(
            f"{link}: {log} names no bundle before the live one; name the bundle to promote"
        )

    after = target_of(link, link.parent / previous[-1])
    load_model(link.parent / after, load_settings())  # raises for a damaged one
    return _record_and_move(link, live, after, reason="back", comparison=None)


def _list_objections(comparison: BundleComparison, old_name: str, new_name: str) -> list[str]:
    """List what speaks against the second bundle; *old_name* and *new_name* are those of the projects."""
    objections = []
    if not comparison.passes:
        objections.append(comparison.summary)
    if comparison.change_problem:
        objections.append(comparison.change_problem)
    if comparison.worse_classes:
        objections.append(f"worse in {shorten(comparison.worse_classes)}")

    if comparison.removed:
        objections.append(f"without the classes {shorten(comparison.removed)}")

    if old_name != new_name:
        objections.append(f"its name is {new_name}, but clients use {old_name}")
    return objections


def _read_target(link: Path) -> str | None:
    """Read where *link* leads, None if it does not exist; raises `ConfigError` for a file or folder."""
    if not link.parent.is_dir():
        raise ConfigError(f"{link}: {link.parent} is no folder; create it")
    if link.exists() and not link.is_symlink():
        raise ConfigError(
            f"{link}: not a link; name one, such as bundles/live, which need not exist yet"
        )

    return read_link(link)


def _record_and_move(
    link: Path,
    before: str | None,
    after: str,
    reason: str,
    comparison: BundleComparison | None,
    *,
    refused: bool = False,
) -> Promotion:
    """Record the move of *link* from *before* to *after*, then make it; a *refused* one is only recorded.

    The line has `MAX_LINE` characters of the *reason* at most; that of a move that fails is
    removed. Raises `ConfigError` if *link* no longer leads to *before*.
    """
    # A container may have no name for the user.
    user = os.environ.get("USER") or str(os.getuid())

    try:
        move = Promotion(
            time=utc_now(), user=user, link=link.name, before=before, after=after, reason=reason[:MAX_LINE],
            refused=refused, comparison=comparison,
        )  # fmt: skip
    except pydantic.ValidationError as error:
        raise ConfigError(
            f"{link}: this move cannot be recorded, {first_problem(error)}"
        ) from error

    # One process at a time reads the log, checks and moves.
    path = link.with_name(LOG)
    with writing(path):
        lock = lock_file(path, wait=True)
    lock.warn_if_unlocked(path, "promote from one place at a time")

    with writing(path), os.fdopen(lock.file, "r+b") as log:
        # What was checked before may have changed until this process got the lock.
        if _read_target(link) != before:
            raise ConfigError(f"{link}: was moved by another process; repeat the command")
        recorded = log.read()

        # A process that was killed may have left an incomplete last line.
        is_torn = bool(recorded) and not recorded.endswith(b"\n")
        log.write((b"\n" if is_torn else b"") + move.model_dump_json().encode() + b"\n")
        log.flush()
        flush(log.fileno())

        # The link moves last, after its line is on the disk.
        if not refused:
            try:
                move_link(link, after)
            except OSError as error:
                log.truncate(len(recorded))  # removes the line of this move
                raise StorageError(
                    f"{link}: cannot be written ({os_reason(error)}); check the permissions of its folder, "
                    "and that its file system has symbolic links"
                ) from error

    return move
