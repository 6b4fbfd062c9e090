"""When the traffic changed, noted beside the photographs that decide about the next bundle.

A server that reports drift knows when the change began. `label` writes it into the folder of the
photographs that decide, and `compare` and `promote` read it there: only photographs since then show
what a bundle must have learned.
"""

from datetime import datetime
from pathlib import Path
from typing import Literal

import pydantic

from sopdeploy.config import StrictModel, parse_json, validate_format
from sopdeploy.files import MAX_NAMES_BYTES, atomic_write, read_file

CHANGE = ".change.json"


class Change(StrictModel):
    """When a change of the traffic began, in UTC."""

    version: Literal[1] = 1
    since: pydantic.AwareDatetime


def write_change(folder: Path, since: datetime) -> None:
    """Note in *folder* that the traffic has changed *since* then."""
    content = Change(since=since).model_dump_json()
    with atomic_write(folder / CHANGE) as partial:
        partial.write_text(content, encoding="utf-8")


def read_change(folder: Path) -> datetime | None:
    """Read when the traffic changed; None if nothing is noted in *folder*, or if the note is damaged."""
    try:
        fields = parse_json(read_file(folder / CHANGE, MAX_NAMES_BYTES))
        return validate_format(Change, fields, ignore_unknown=True).since
    except (OSError, ValueError):
        return None
