"""Options of `sopdeploy.classify` and `sopdeploy classify`."""

from pathlib import Path
from typing import Annotated

import pydantic

from sopdeploy.config import Options

PART_IMAGES = 4096


class ClassifyOptions(Options):
    """What a run writes, and how."""

    logits: bool = False
    """Add a column with the logits."""
    features: bool = False
    """Add a column with the features; the bundle must have been exported with_features or with_cam."""
    workers: Annotated[int | None, pydantic.Field(ge=1, le=1024)] = None
    """Processes that load images; by default one per core, up to 16."""
    keep: Path | None = None
    """Copy photographs that are worth a label to this folder, as a server does."""
    part_images: Annotated[int, pydantic.Field(ge=1, le=2**31 - 1)] = PART_IMAGES
    """Images per parquet file, rounded up to full batches."""
