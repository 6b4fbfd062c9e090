"""Options of `sopdeploy ray`: the number of replicas, and what each of them gets."""

from typing import Annotated

import pydantic

from sopdeploy.config import Count, Options
from sopdeploy.errors import ConfigError


class ScaleOptions(Options):
    """A fixed number of replicas, or the limits of their number, and the resources of each."""

    replicas: Annotated[int | None, pydantic.Field(ge=1)] = None
    """Number of replicas; by default 1."""
    min_replicas: Annotated[int | None, pydantic.Field(ge=0)] = None
    """Fewest replicas, with --max-replicas."""
    max_replicas: Annotated[int | None, pydantic.Field(ge=1)] = None
    """Scale with the load, up to this number of replicas."""
    gpus_per_replica: Annotated[float, pydantic.Field(ge=0, le=64)] = 0.0
    """GPUs of a replica: 0.5 lets two share one, 0 uses the CPU."""
    cpus_per_replica: Count = 1
    """Cores that Ray reserves; also the default number of threads."""

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> "ScaleOptions":
        if self.replicas is not None and (self.min_replicas, self.max_replicas) != (None, None):
            raise ConfigError("a fixed number; omit it, or the smallest and largest", setting="replicas")
        if self.min_replicas is not None and self.max_replicas is None:
            remedies = {"max_replicas": None}
            raise ConfigError("needs the largest number, too", setting="min_replicas", remedies=remedies)
        if self.max_replicas is not None and (self.min_replicas or 0) > self.max_replicas:
            reason = f"is more than the largest number, {self.max_replicas}"
            raise ConfigError(reason, setting="min_replicas", value=self.min_replicas)
        if self.gpus_per_replica > 1 and not self.gpus_per_replica.is_integer():
            reason = "must be a fraction of one GPU or a whole number"
            raise ConfigError(reason, setting="gpus_per_replica", value=self.gpus_per_replica)
        return self
