"""Options of `sopdeploy classify`."""

from typing import Annotated, ClassVar

import pydantic

from sopdeploy.base.config import Count, Options


class ClassifyOptions(Options):
    """What a run writes, and how."""

    KEYS: ClassVar = ("logits", "workers", "actors", "gpus_per_actor", "part_images")

    logits: bool = False
    """Add a column with the logits."""
    features: bool = False
    """Add a column with the features; the bundle must have been exported with_features."""
    workers: Annotated[int | None, pydantic.Field(ge=1, le=1024)] = None
    """Processes that load images, of each copy of the bundle; by default one per core, up to 16."""
    ray: str | None = None
    """HOST:PORT of a Ray cluster that classifies; `auto`: the cluster of this machine, `local`: a new one here."""
    actors: Count | None = None
    """Copies of the bundle on the Ray cluster; by default one per machine."""
    gpus_per_actor: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    """GPUs of a copy on the Ray cluster: 1, 0.5 lets two share one, 0 uses the CPU."""
    part_images: Annotated[int | None, pydantic.Field(ge=1, le=2**31 - 1)] = None
    """Images per parquet file; by default 512, or the number of the run that you continue."""

    @property
    def starts_cluster(self) -> bool:
        """Whether a Ray cluster starts and ends with the command."""
        return self.ray == "local"
