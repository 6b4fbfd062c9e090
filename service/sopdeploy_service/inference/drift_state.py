"""What a server stores about the drift of each model, beside its blocks of predictions; `label` reads it, too."""

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from sopdeploy.config import StrictModel, parse_json, validate_format
from sopdeploy.files import MAX_TEXT_BYTES, read_file

TRAFFIC = ".traffic"  # subfolder of the folder of kept photographs, with one for each model
STATE = "state.json"  # in the folder of a model


class DriftState(StrictModel):
    """How the blocks of a model's traffic are divided, and its alarm.

    Attributes:
        reference: Numbers of the blocks of the reference; the others are the window.
        since: When the change of an alarm began, in UTC; None without an alarm.
        alarm_blocks: Blocks that raised the alarm.
        is_replaced: Whether another bundle came during the alarm.
    """

    version: Literal[1] = 1
    reference: tuple[int, ...]
    since: pydantic.AwareDatetime | None = None
    alarm_blocks: Annotated[int, pydantic.Field(ge=0)] = 0
    is_replaced: bool = False


def read_drift_state(path: Path) -> DriftState | None:
    """Read the state at *path*; None if the file is missing or damaged."""
    try:
        fields = parse_json(read_file(path, MAX_TEXT_BYTES))
        return validate_format(DriftState, fields, ignore_unknown=True)
    except (OSError, ValueError):
        return None


def read_alarms(kept: Path) -> dict[str, datetime]:
    """Read when the changes began that servers report now, by model, for the servers that keep below *kept*."""
    begins = dict[str, datetime]()
    for pattern in (f"{TRAFFIC}/*/{STATE}", f"*/{TRAFFIC}/*/{STATE}"):
        for path in kept.glob(pattern):
            state = read_drift_state(path)
            if state is not None and state.since is not None:
                name = path.parent.name
                begins[name] = min(state.since, begins.get(name, state.since))
    return begins
