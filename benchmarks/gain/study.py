"""A study: arms that are run on the same seeds, and which arm is compared with which."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gain.run import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """`template` holds what all runs share, `arms` what each changes in it; `seeds` are fixed beforehand.

    Every arm is compared with `reference`; `pairs` are further comparisons (ours, other). `must` maps an
    arm to the points it has to lie above the reference, `chance` names the arm that must be at chance.
    """

    name: str
    title: str
    seeds: tuple[int, ...]
    template: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    reference: str = ""
    pairs: tuple[tuple[str, str], ...] = ()
    must: Mapping[str, float] = field(default_factory=dict)
    chance: str = ""

    def run(self, arm: str, seed: int) -> Run:
        """Return the run of *arm* with *seed*."""
        return Run.model_validate({**self.template, **self.arms[arm], "seed": seed})

    def runs(self) -> list[tuple[str, int, Run]]:
        """Return all runs, seed by seed, so that a study that is stopped has whole seeds."""
        return [(arm, seed, self.run(arm, seed)) for seed in self.seeds for arm in self.arms]
