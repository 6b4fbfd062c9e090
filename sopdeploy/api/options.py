"""Options of `train` and `evaluate`, and early checks of `train`; imports no torch, which takes seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from sopdeploy.config import Options
from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.files import check_is_weights, expand_user
from sopdeploy.project import Name
from sopdeploy.training.recipe_files import parse_override, read_values

# A path and a number are converted.
Text = Annotated[str | None, pydantic.BeforeValidator(lambda value: None if value is None else str(value))]
PUBLISHED = ("imagenet", "none")  # start weights that are no file
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
    """Folder of images of none of the classes, which test the rejection; sets `rejection.unknown`."""
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


def check_train(
    data: Path | None, recipe: str | None, out: Path | None, options: TrainOptions, assignments: Sequence[str]
) -> None:
    """Raise the error of a path or a text that `train` cannot use, before it imports torch."""
    from sopdeploy.data.datasets.folder import FolderConfig
    from sopdeploy.data.folders import data_folder
    from sopdeploy.data.sources import open_data

    for assignment in assignments:
        parse_override(assignment)
    if recipe is not None:
        read_values(recipe)
    elif data is not None and not assignments:
        open_data(FolderConfig(kind="folder", path=data))
    if out is not None and out.is_file():
        raise ConfigError(f"{out} is a file; choose a folder", setting="out")
    if options.from_ is not None and not Path(options.from_).exists():
        raise ConfigError(
            f"{options.from_}: no such run or bundle; `sopdeploy runs` lists them", setting="from"
        )
    if options.weights is not None and options.weights not in PUBLISHED:
        try:
            check_is_weights(expand_user(options.weights))
        except WeightsError as error:
            raise WeightsError(f"{error}, or {' or '.join(PUBLISHED)}", setting="weights") from error
    if options.unknown is not None:
        data_folder(Path(options.unknown))
