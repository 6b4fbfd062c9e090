"""Options of `sopdeploy.classify` and `sopdeploy classify`."""

from typing import Annotated

import pydantic

from sopdeploy.config import Count, Options

PART_IMAGES = 4096


class ClassifyOptions(Options):
    """What a run writes, and how."""

    logits: bool = False
    """Add a column with the logits."""
    features: bool = False
    """Add a column with the features; the bundle must have been exported with_features or with_cam."""
    max_errors: Annotated[int | None, pydantic.Field(ge=0)] = None
    """Stop when more images have an error; by default never."""
    workers: Annotated[int | None, pydantic.Field(ge=1, le=1024)] = None
    """Decoder processes; by default one per core, up to 16."""
    part_images: Annotated[int, pydantic.Field(ge=1, le=2**31 - 1)] = PART_IMAGES
    """Images per parquet file, rounded up to full batches."""


class RayOptions(Options):
    """The Ray cluster of a run, and what it reserves for each actor."""

    model_config = pydantic.ConfigDict(title="Ray")

    ray: str | None = None
    """Address of a Ray cluster that classifies the images; `auto` joins or starts one here."""
    actors: Count = 1
    """Processes on Ray that run the network."""
    cpus_per_actor: Count = 1
    """Cores per actor."""
    gpus_per_actor: Annotated[float, pydantic.Field(ge=0, le=64)] = 0.0
    """GPUs per actor; 0.5 lets two share one, 0 uses the CPU."""
