"""Optimisation profiles: which batch sizes an engine is built and tuned for.

`1,8,32` gives three profiles that do not overlap: exactly 1, 2 to 8, 9 to 32. Each is tuned for its largest
batch, so every batch has one profile, and the single image gets an engine without a free dimension.
"""

from collections.abc import Sequence

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.config import Count, StrictModel
from sopdeploy.errors import ConfigError

MOST = 8  # each profile is tuned by itself and holds memory of its own


class Profile(StrictModel):
    """The batch sizes of one profile, and the one it is tuned for."""

    minimum: Count
    optimum: Count
    maximum: Count

    def __str__(self) -> str:
        return f"{self.minimum}" if self.minimum == self.maximum else f"{self.minimum}-{self.maximum}"


def parse_profiles(text: str | None, batch: BatchRange) -> tuple[Profile, ...]:
    """Return the profiles of *text* such as `1,8,32`; of *batch* where there is no text.

    Raises `ConfigError` where a size is no number, or outside of what the bundle was verified for.
    """
    if text is None:
        return make_profiles((batch.minimum, batch.optimum, batch.maximum), batch)
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError as problem:
        raise ConfigError(f"--profiles {text}: write batch sizes such as 1,8,32") from problem
    return make_profiles(sizes, batch)


def make_profiles(sizes: Sequence[int], batch: BatchRange) -> tuple[Profile, ...]:
    """Return one profile for each of *sizes*, each from the one before it up to the size."""
    ordered = sorted(set(sizes))
    if not ordered or ordered[0] < batch.minimum or ordered[-1] > batch.maximum:
        raise ConfigError(
            f"--profiles {','.join(map(str, sizes))}: the bundle was verified for batches of "
            f"{batch.minimum} to {batch.maximum}"
        )
    if len(ordered) > MOST:
        raise ConfigError(f"--profiles: {len(ordered)} profiles, at most {MOST} are sensible")
    starts = [batch.minimum, *(size + 1 for size in ordered[:-1])]
    return tuple(
        Profile(minimum=start, optimum=size, maximum=size)
        for start, size in zip(starts, ordered, strict=True)
    )


def index_for(profiles: Sequence[Profile], batch: int) -> int:
    """Return the index of the profile that takes *batch* images."""
    for index, profile in enumerate(profiles):
        if profile.minimum <= batch <= profile.maximum:
            return index
    raise ConfigError(f"no profile takes {batch} images; there are {', '.join(map(str, profiles))}")
