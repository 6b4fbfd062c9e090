"""`sopdeploy promote`: lead the link that a server follows to another bundle, and record it.

`promotions.jsonl` beside the link has one line for each move, and for each bundle that was refused.
The line is on disk before the link is moved.
"""

import errno
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import pydantic

from sopdeploy.base.config import MAX_LINE, StrictModel, Text, first_problem
from sopdeploy.base.file_systems import flush, lock_file
from sopdeploy.base.files import move_link, os_reason, target_of, writing
from sopdeploy.base.names import LinkPath
from sopdeploy.base.project import Time, utc_now
from sopdeploy.bundle.folder import read_manifest
from sopdeploy.bundle.live import LOG, read_log
from sopdeploy.cli.command import command
from sopdeploy.cli.console import print_field, say
from sopdeploy.data.photos.files import data_folder
from sopdeploy.errors import ConfigError, PromotionError, StorageError, shorten
from sopdeploy_commands.compare import (
    TOLERANCE,
    BundleComparison,
    Tolerance,
    compare_loaded,
)
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.settings import load_settings


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


def _show(move: Promotion) -> None:
    """Print what the link leads to, and why."""
    print_field(
        move.link, f"{move.after} (before: {move.before or 'nothing'})", style="bold green"
    )
    say(move.reason)
    for note in move.comparison.notes if move.comparison else ():
        say(note)


@command(
    _show,
    options={"over", "data"},
    examples=(
        "sopdeploy promote bundles/latest --over bundles/live --data photos",
        "sopdeploy promote --back bundles/live",
    ),
)
def promote(
    new: Path | None = None,
    over: Path | None = None,
    data: Path | None = None,
    *,
    tolerance: Tolerance = TOLERANCE,
    force: str | None = None,
    back: Path | None = None,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> Promotion:
    """Move the link that a server follows to a new bundle, and record it.

    With --data, both bundles are compared, and a bundle that may lose more than the tolerance is
    refused. A bundle that lacks a class of the live one or has another name is also refused.
    `promotions.jsonl` next to the link records each move and each refusal.

    Before the move, the new bundle is loaded, and its hashes and outputs are checked.

    Args:
        new: The bundle to serve.
        over: Link that the server follows; created if absent.
        data: Folder of images that neither bundle was trained on, DIR/<class>/*.jpg.
        tolerance: Points of accuracy that it may lose on up to 100 images, and half as many on 1,000.
        force: Reason to move the link in any case; recorded.
        back: Link to move back to the previous bundle, without other arguments. A second time undoes the first.
        on_image: Called with the numbers of predictions done and in total.

    Raises:
        PromotionError: The objections, or there is no bundle to go back to.
        ConfigError: *over* or *back* is not a link, or arguments that do not fit together.
    """
    # Back to an earlier bundle, or to a new one: each with its own options.
    if back is not None and all(other is None for other in (new, over, data, force)):
        return _move_back(back)
    if new is None or over is None or back is not None:
        raise ConfigError("give NEW --over LINK, or --back LINK alone")

    # The first bundle is not compared, but a wrong folder is an error then, too.
    if data is not None:
        data_folder(data)

    before = _read_target(over)
    if over.exists() and os.path.realpath(over) == os.path.realpath(new):
        raise ConfigError(f"{over}: already leads to this bundle; name another one")

    # A damaged bundle must not become live.
    after = target_of(over, new)
    settings = load_settings()
    loaded = load_model(over.parent / after, settings)  # raises an error for a damaged bundle
    identity = loaded.bundle.manifest.id

    # If the link leads to a bundle that was deleted, nothing is live.
    if not over.exists():
        return _record_and_move(over, before, after, force or "first bundle", identity)

    live = load_model(over, settings)
    objections = _list_objections(live, loaded)
    comparison: BundleComparison | None = None
    if data is not None:
        comparison = compare_loaded(
            (live, loaded), data, settings, tolerance=tolerance, on_image=on_image
        )
        if not comparison.passes:
            objections.append(comparison.summary)

    if objections and force is None:
        reason = "; ".join(objections)
        _record_and_move(over, before, after, reason, identity, comparison, refused=True)
        raise PromotionError(
            f"{new}: not promoted, {reason}; to do it anyway, give --force REASON",
            lists={"objections": objections},
        )

    reason = force or (comparison.summary if comparison else "not compared")
    return _record_and_move(over, before, after, reason, identity, comparison)


def _list_objections(live: LoadedModel, new: LoadedModel) -> list[str]:
    """List what speaks against *new* without an image."""
    objections = []
    removed = sorted(set(live.bundle.labels) - set(new.bundle.labels))
    if removed:
        objections.append(f"without the classes {shorten(removed)}")

    old_name, new_name = (model.bundle.manifest.project for model in (live, new))
    if old_name != new_name:
        objections.append(f"its name is {new_name}, but clients use {old_name}")
    return objections


def _move_back(link: Path) -> Promotion:
    """Move *link* back to the bundle that was live before the last move to the live one, and record it."""
    live = _read_target(link)

    # The bundles before it, the oldest first; before the first bundle of all, none was live. Other
    # fields of a line may be of another version.
    previous = [
        fields["before"]
        for _, fields in read_log(link.parent)
        if (fields.get("link"), fields.get("after")) == (link.name, live)
        and isinstance(fields.get("before"), str)
        and fields.get("refused") is not True
    ]
    if not previous:
        log = link.with_name(LOG)
        raise PromotionError(
            f"{link}: {log} names no bundle before the live one; name the bundle to promote"
        )

    after = target_of(link, link.parent / previous[-1])
    loaded = load_model(link.parent / after, load_settings())  # raises for a damaged one
    return _record_and_move(link, live, after, "back", loaded.bundle.manifest.id)


def _read_target(link: Path) -> str | None:
    """Read the bundle to which *link* leads, relative to its folder; None if it does not exist.

    Raises `ConfigError` for a file or folder.
    """
    if not link.parent.is_dir():
        raise ConfigError(f"{link}: {link.parent} is not a folder; create it")
    if not link.is_symlink():
        if link.exists():
            raise ConfigError(
                f"{link}: not a link; name one, such as bundles/live, which need not exist yet"
            )
        return None

    # A link to a link, such as `latest`, counts as a link to the bundle.
    target = str(link.readlink())
    return (
        target_of(link, link.parent / target) if (link.parent / target).is_symlink() else target
    )


def _record_and_move(
    link: Path,
    before: str | None,
    after: str,
    reason: str,
    identity: str,
    comparison: BundleComparison | None = None,
    *,
    refused: bool = False,
) -> Promotion:
    """Record the move of *link* from *before* to *after*, then make it; a *refused* one is only recorded.

    The line has `MAX_LINE` characters of the *reason* at most; that of a move that fails is
    removed. Raises `ConfigError` if *link* no longer leads to *before*, or if *after* is no longer
    the bundle with this *identity*.
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

    # One process at a time checks, records and moves.
    path = link.with_name(LOG)
    with writing(path):
        lock = lock_file(path, wait=True)
    lock.warn_if_unlocked(path, "promote from one place at a time")

    with FileIO(lock.file, "r+") as log:
        # What was checked before may have changed until this process got the lock.
        if _read_target(link) != before:
            raise ConfigError(f"{link}: was moved by another process; repeat the command")
        if read_manifest(link.parent / after).id != identity:
            raise ConfigError(f"{after}: was replaced by another bundle; repeat the command")

        # The link moves last, after its line is on the disk.
        end = log.seek(0, os.SEEK_END)
        try:
            _append_line(log, end, move.model_dump_json().encode())
            if not refused:
                move_link(link, after)
        except OSError as error:
            log.truncate(end)  # a line of a move that was not made, or a part of one
            raise StorageError(
                f"{link}: cannot be written ({os_reason(error)}); check the permissions and the free "
                "space of its folder, and that its file system has symbolic links"
            ) from error

    return move


def _append_line(log: FileIO, end: int, line: bytes) -> None:
    """Append *line* to *log*, which has *end* bytes, and flush it to the disk; raises `OSError`."""
    # A process that was killed may have left an incomplete last line.
    log.seek(max(0, end - 1))
    is_torn = log.read(1) not in {b"", b"\n"}
    content = (b"\n" if is_torn else b"") + line + b"\n"

    # A full disk may take only a part.
    if log.write(content) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    flush(log.fileno())
