"""Options of `train` and `evaluate`; imports neither torch nor the packages that they use."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic

from sopdeploy.config import Options
from sopdeploy.project import Name

# A path and a number are converted.
Text = Annotated[str | None, pydantic.BeforeValidator(lambda value: None if value is None else str(value))]
Workers = Annotated[int, pydantic.Field(ge=0)]


class TrainOptions(Options):
    """Options of `sopdeploy.train` and `sopdeploy train`."""

    from_: Text = None
    """A run, or a bundle whose run is in runs: start from its recipe, and print its accuracy and what was
    added since."""
    weights: Text = None
    """Start weights: imagenet, none (random), a checkpoint or a weight file; sets `start.weights`. By default
    imagenet for a folder of images without a recipe."""
    name: Name = None
    """Name of the project, by default that of the data folder or of the recipe; sets `project`."""
    unknown: Text = None
    """Folder of images of none of the classes: half of them sets the threshold for unknown images, half tests
    it; sets `rejection.unknown`."""
    resume: Literal["never", "always", "auto"] = "never"
    """Continue the run in the folder, by default the newest of the project; auto starts a new one if there is
    none."""
    tensorboard: bool = False
    """Also write the metrics to the run's folder tensorboard; `wandb sync` reads its files."""


class EvaluateOptions(Options):
    """Options of `sopdeploy.evaluate` and `sopdeploy eval`."""

    heads: bool = False
    """Also evaluate every branch of a checkpoint."""
    runtime: str | None = None
    """Runtime of a bundle, as for `serve`; tensorrt uses the engine."""
    fit_decision: Path | None = None
    """Fit temperature and threshold for unknown images of a checkpoint to these images, and write a copy with
    them to this file; for several classes per image, a threshold per class."""
    accepts: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.95
    """Fraction of images of known classes to accept as known, with the fitted threshold; 1 rejects none."""
    workers: Workers = 0
    """Processes that load images for a checkpoint."""
