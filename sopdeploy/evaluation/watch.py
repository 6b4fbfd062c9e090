"""Watches blocks of predictions for drift: what is compared with what, when an alarm begins and ends.

The *reference* are blocks from before, the *window* the newer ones. The reference grows until it is
as large as a full window, and is compared from `NEWEST_BLOCKS` on. A full window that does not seem
to differ replaces it. So the reference of an alarm is from before the change, also if another
bundle comes meanwhile, which then predicts the images of the reference again.

An alarm ends with a window that does not differ any more, or if too little of its reference is
left. The world may stay changed: with a bundle that came during the alarm, other classes and other
light are no alarm any more, but lower scores and more rejected images are, because these are what
such a bundle should mend.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeAlias, TypeVar

from sopdeploy.evaluation.drift import BLOCK, NEWEST, REFERENCE, WINDOW, Comparison

NUM_BLOCKS = WINDOW // BLOCK  # of a full window
NEWEST_BLOCKS = NEWEST // BLOCK  # of the reference and of the window in the first comparison
# Newest blocks that are compared besides the whole window.
COMPARED = (NEWEST_BLOCKS, 2 * NEWEST_BLOCKS, 3 * NEWEST_BLOCKS)
FIRST_BLOCKS = REFERENCE // BLOCK
END_BLOCKS = 8  # without an alarm, which end it
UNSURE = 0.2  # p-value up to which a window may differ, so that it is no reference

BlockT = TypeVar("BlockT")
Comparisons: TypeAlias = Mapping[str, Comparison]
Compare: TypeAlias = Callable[[Sequence[BlockT], Sequence[BlockT]], Comparisons]
News = Literal["begins", "goes on", "ends"]


@dataclass(eq=False)
class Watch(Generic[BlockT]):
    """The blocks and the alarm of one source of predictions.

    Attributes:
        reference: Blocks from before.
        window: Blocks after the reference; during an alarm, those since it began.
        alarm_blocks: Blocks that raised the alarm; 0 without one.
        is_replaced: Whether another bundle came during the alarm.
        is_told: Whether it was told that this bundle does not end the alarm.
    """

    reference: list[BlockT] = field(default_factory=list)
    window: list[BlockT] = field(default_factory=list)
    alarm_blocks: int = 0
    is_replaced: bool = False
    is_told: bool = False

    @property
    def is_alarm(self) -> bool:
        """Whether the predictions differ."""
        return self.alarm_blocks > 0

    @property
    def num_needed(self) -> int:
        """Blocks until the next comparison can be made."""
        return max(1, self._num_missing)

    @property
    def _num_missing(self) -> int:
        """Blocks that the reference and the window lack for a comparison."""
        parts = (self.reference, self.window)
        return sum(max(0, NEWEST_BLOCKS - len(part)) for part in parts)

    def add(self, block: BlockT) -> bool:
        """Add *block*, and return whether there are enough blocks for a comparison."""
        self.window.append(block)

        # Blocks of the reference can be lost at a restart. With too few, no comparison could end
        # the alarm.
        if len(self.reference) < NEWEST_BLOCKS:
            self.alarm_blocks = 0
            self.is_replaced = False

        # The reference is incomplete at first: it gets the oldest block of the window that the
        # comparisons do not need. Soon, they need more, so that a change is seen before it is usual.
        is_small = len(self.reference) < FIRST_BLOCKS
        num_kept = NEWEST_BLOCKS if is_small else COMPARED[-1]
        can_grow = len(self.reference) < NUM_BLOCKS and not self.is_alarm
        if can_grow and len(self.window) > num_kept:
            self.reference.append(self.window.pop(0))

        del self.window[:-NUM_BLOCKS]
        return self._num_missing == 0

    def replace(self, reference: Sequence[BlockT]) -> None:
        """Go on with another bundle, whose predictions for the images of the reference are *reference*."""
        self.reference = list(reference)
        self.window = []
        self.is_replaced = self.is_alarm
        self.is_told = False

    def test(self, compare: Compare[BlockT]) -> tuple[Comparisons, News | None]:
        """Compare parts of the newest blocks and the whole window with the reference; move what is due.

        *compare* compares two lists of blocks. Also returns what is new about the alarm.
        """
        whole = compare(self.reference, self.window)
        newest = {
            count: compare(self.reference, self.window[-count:])
            for count in COMPARED
            if count < len(self.window)
        }
        clearest = choose_clearest([whole, *newest.values()])

        if self.is_alarm:
            return clearest, self._continue(compare)

        if not any(one.is_alarm for one in clearest.values()):
            is_usual = all(one.p_value > UNSURE for one in whole.values())
            if len(self.window) == NUM_BLOCKS and is_usual:
                self.reference = self.window
                self.window = []
            return clearest, None

        # A large change is in the newest blocks only.
        counts = [
            count
            for count, compared in newest.items()
            if any(one.is_alarm for one in compared.values())
        ]
        self.window = self.window[-min(counts, default=len(self.window)) :]
        self.alarm_blocks = len(self.window)
        return clearest, "begins"

    def _continue(self, compare: Compare[BlockT]) -> News | None:
        """End the alarm if the newest blocks do not differ any more."""
        needed = END_BLOCKS if self.is_replaced else max(END_BLOCKS, self.alarm_blocks)
        if len(self.window) < needed:
            return None

        compared = compare(self.reference, self.window[-needed:])
        counted = find_unmended(compared) if self.is_replaced else compared
        if any(one.is_alarm for one in counted.values()):
            is_new = self.is_replaced and not self.is_told
            self.is_told = self.is_replaced
            return "goes on" if is_new else None

        # The world of a bundle that has learned it is the reference from now on.
        if self.is_replaced:
            self.reference = self.window[-needed:]
        self.window = []
        self.alarm_blocks = 0
        self.is_replaced = False
        return "ends"


def choose_clearest(comparisons: Sequence[Comparisons]) -> Comparisons:
    """Return the clearest comparison of each statistic: an alarm, then the smallest p-value."""
    return {
        name: min(
            (compared[name] for compared in comparisons),
            key=lambda one: (not one.is_alarm, one.p_value),
        )
        for name in comparisons[0]
    }


def find_unmended(compared: Comparisons) -> Comparisons:
    """Return the comparisons that a bundle which has learned the change would mend."""
    worse = {"score": False, "unknown": True}  # whether the number rises
    return {
        name: one
        for name, one in compared.items()
        if name in worse and one.rises is worse[name]
    }
