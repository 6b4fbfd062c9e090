"""Optimization profiles: the batch sizes that an engine is built and tuned for.

`1,8,32` gives three disjoint profiles: 1, 2 to 8, and 9 to 32. Each is tuned for its largest batch. Every
batch size has exactly one profile, and single images run without a dynamic dimension.
"""

from collections.abc import Sequence

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.config import Count, StrictModel
from sopdeploy.errors import ConfigError


class Profile(StrictModel):
    """The batch sizes of a profile; it is tuned for `optimum`."""

    minimum: Count
    optimum: Count
    maximum: Count

    def __str__(self) -> str:
        return f"{self.minimum}" if self.minimum == self.maximum else f"{self.minimum}-{self.maximum}"


def parse_profiles(text: str | None, batch: BatchRange) -> tuple[Profile, ...]:
    """Parse `1,8,32` to one profile per size; without *text*, use the sizes of *batch*.

    Each profile covers the batches from the previous size plus one up to its size. Raises `ConfigError` if a
    size is not a number or outside the range that the bundle was verified for.
    """
    if text is None:
        sizes = [batch.minimum, batch.optimum, batch.maximum]
    else:
        try:
            sizes = [int(part) for part in text.split(",")]
        except ValueError as error:
            raise ConfigError("write batch sizes such as 1,8,32", setting="profiles", value=text) from error
    ordered = sorted(set(sizes))
    if ordered[0] < batch.minimum or ordered[-1] > batch.maximum:
        raise ConfigError(
            f"the bundle was verified for batches of {batch.minimum} to {batch.maximum}; choose from these",
            setting="profiles",
            value=text,
        )
    starts = [batch.minimum, *(size + 1 for size in ordered[:-1])]
    return tuple(
        Profile(minimum=start, optimum=size, maximum=size)
        for start, size in zip(starts, ordered, strict=True)
    )


def merge_profiles(profiles: Sequence[Profile]) -> Profile:
    """Return one profile for all batches of *profiles*, tuned for the largest."""
    return Profile(minimum=profiles[0].minimum, optimum=profiles[-1].optimum, maximum=profiles[-1].maximum)


def index_for(profiles: Sequence[Profile], batch: int) -> int:
    """Return the index of the profile for *batch* images; raise `ConfigError` if there is none."""
    for index, profile in enumerate(profiles):
        if profile.minimum <= batch <= profile.maximum:
            return index
    accepted = ", ".join(map(str, profiles))
    raise ConfigError(f"no profile accepts {batch} images; send batches of {accepted} images")
