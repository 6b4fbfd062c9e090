"""A study: arms that run with the same seeds, and the comparisons between them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gain.train_and_measure import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """An experiment: `template` has the fields of `Run` for all arms, `arms` the changes of each arm.

    All arms run with the same `seeds`. Every arm is compared with `reference`; `pairs` lists
    further comparisons (ours, other). `images` names what all lengths of training share. `rates` is
    the grid of learning rates for the arms that `search` lists; `rate_of` maps an arm to one of them,
    whose rate it takes. Studies with the same `rates_for` have the same rates. The studies with
    `decides` among them choose these rates together.
    """

    name: str
    images: str
    title: str
    seeds: tuple[int, ...]
    template: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    reference: str = ""
    pairs: tuple[tuple[str, str], ...] = ()
    rates: tuple[float, ...] = ()
    search: tuple[str, ...] = ()
    rate_of: Mapping[str, str] = field(default_factory=dict)
    rates_for: str = ""
    decides: bool = True

    def run(self, arm: str, seed: int, **changes: Any) -> Run:
        """Create the run of *arm* with *seed*."""
        return Run.model_validate({**self.template, **self.arms[arm], "seed": seed, **changes})
