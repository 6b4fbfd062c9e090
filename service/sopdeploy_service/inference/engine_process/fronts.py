"""The engine's records of its front ends, and the codes in requests and replies."""

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from sopdeploy_service.inference.engine_process.channel import ChannelError, Outbox
from sopdeploy_service.inference.engine_process.slots import Slots
from sopdeploy_service.inference.model_worker import QueuedImage
from sopdeploy_service.inference.results import (
    CLIENT_GONE,
    DEADLINE,
    DRAINING,
    ENGINE_DEAD,
    ENGINE_FAILED,
    NONFINITE,
    OUT_OF_MEMORY,
    Outcome,
)

WANTS_FEATURES, IS_COMMAND = 1, 2  # flags of a request
MAX_COMMAND_BYTES = 4096  # every slot is at least this large
REJECTIONS = (CLIENT_GONE, DEADLINE, DRAINING, ENGINE_DEAD, ENGINE_FAILED, NONFINITE, OUT_OF_MEMORY)
CODES = {rejection.code: position for position, rejection in enumerate(REJECTIONS, 1)}  # 0: outputs


@dataclass(eq=False, slots=True)
class OwnedSlots:
    """A front end's slots in one shared memory: those that the engine owns and their last generations."""

    slots: Slots
    owned: bytearray
    generations: list[int]


@dataclass(eq=False, slots=True)
class Front:
    """A front end: its channel, its shared memory by number and the models that it may use."""

    name: str
    channel: socket.socket
    outbox: Outbox
    memories: dict[int, OwnedSlots] = field(default_factory=dict)
    newest: int = -1  # number of its newest memory
    pending: bytearray = field(default_factory=bytearray)  # part of a record
    uses: set[int] = field(default_factory=set)
    released: set[int] = field(default_factory=set)  # models that it has used
    applied: int = 0  # number of the last change of models that it has applied
    blocked: bool = False  # its channel accepts nothing more now
    closed: bool = False


@dataclass(eq=False, kw_only=True, slots=True)
class SlotImage(QueuedImage):
    """An image, or a command, in a slot that the engine owns until `settle` was called."""

    front: Front
    memory: OwnedSlots
    number: int  # of the memory
    slot: int
    generation: int
    answer: Callable[["SlotImage", Outcome], None]

    def is_over(self, now: float) -> bool:
        """Tell whether the front end or its client has gone, or the deadline has passed."""
        return self.deadline <= now or self.front.closed or self.memory.slots.is_cancelled(self.slot)

    def settle(self, outcome: Outcome) -> None:
        """Write *outcome* to the slot and return it; on the engine's loop."""
        self.answer(self, outcome)


def parse_command(text: bytes) -> tuple[str, str, str | None]:
    """Parse the operation, the name of a model and the folder of a bundle; raises `ChannelError`."""
    try:
        command = json.loads(text)
        operation, name, folder = command["operation"], command["name"], command["folder"]
        valid = operation in {"load", "unload", "roll_back"}
        valid &= isinstance(name, str) and (folder is None or isinstance(folder, str))
    except (ValueError, KeyError, TypeError, RecursionError):
        valid = False
    if not valid:
        raise ChannelError("not a command")
    return operation, name, folder
