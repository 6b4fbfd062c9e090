"""Which bundles of a folder are live, and which were refused: its log of promotions says so.

`sopdeploy promote` writes a line of `promotions.jsonl` for each move of a link beside it, and for
each bundle that it refused. Where the links lead now is what is live.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sopdeploy.base.config import parse_json
from sopdeploy.base.files import MAX_NAMES_BYTES, read_file
from sopdeploy.errors import ConfigError

LOG = "promotions.jsonl"


class Live(NamedTuple):
    """Real paths of the live bundles of a folder, the last promoted first, and of the refused ones."""

    live: tuple[str, ...] = ()
    refused: frozenset[str] = frozenset()


def read_log(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the fields of each line of the log in *folder*, the oldest first.

    A line that is not a JSON object is skipped: it may have been cut off when the machine stopped.
    Raises `ConfigError` for a log that cannot be read.
    """
    log = folder / LOG
    try:
        lines = read_file(log, MAX_NAMES_BYTES).splitlines() if os.path.lexists(log) else []
    except OSError as error:
        raise ConfigError(
            f"{log}: cannot be read ({error.strerror}); repair or move it away"
        ) from error

    for number, line in enumerate(lines, 1):
        try:
            fields = parse_json(line)
        except ValueError:
            continue
        if isinstance(fields, dict):
            yield number, fields


def read_live(folder: Path) -> Live:
    """Read what is live in *folder*, and what was refused; nothing of a folder without a log.

    A link that is missing, as in a copy of the folder, leads where its last move led. A bundle
    counts as refused if its last line says so, and it is not live. Raises `ConfigError` for a log
    that cannot be read.
    """
    # The log tells what each link led to last, and what was refused and not promoted later.
    target_of_link: dict[str, str] = {}  # in the order of the last moves
    refused = set[str]()
    for _, fields in read_log(folder):
        link = fields.get("link")
        after = fields.get("after")
        if not isinstance(link, str) or not isinstance(after, str):
            continue

        target = os.path.realpath(folder / after)
        if fields.get("refused") is True:
            refused.add(target)
            continue
        refused.discard(target)
        target_of_link.pop(link, None)
        target_of_link[link] = target

    # A link that was moved by hand counts as it is now.
    live = []
    for link, target in reversed(target_of_link.items()):
        path = folder / link
        live.append(os.path.realpath(path) if path.is_symlink() else target)
    return Live(tuple(live), frozenset(refused.difference(live)))
