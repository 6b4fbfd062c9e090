"""`sopdeploy.train`, `sopdeploy train` and `sopdeploy recipes`."""

import tomllib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import pydantic

from sopdeploy.bundle.folder import MANIFEST, read_manifest
from sopdeploy.cli.command import command
from sopdeploy.cli.console import ProgressBars, err, print_table, say
from sopdeploy.config import Options, StrictModel, expand_options
from sopdeploy.data.datasets.folder import FolderConfig
from sopdeploy.data.folders import data_folder
from sopdeploy.data.sources import open_data
from sopdeploy.decision import Rejection
from sopdeploy.environment import is_main_process
from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.files import check_is_weights, expand_user
from sopdeploy.project import Name, folder_project
from sopdeploy.training.recipe_files import list_recipes, parse_override, read_values, recipe_text
from sopdeploy.training.results import read_result

if TYPE_CHECKING:
    from sopdeploy.report.page import TrainedRun
    from sopdeploy.training.callbacks import Callback
    from sopdeploy.training.recipe import Recipe
    from sopdeploy.training.start_weights import WeightSource

FOLDER_RECIPE = "photos"
PUBLISHED = ("imagenet", "none")  # start weights that are no file
# A path and a number are converted.
Text = Annotated[str | None, pydantic.BeforeValidator(lambda value: None if value is None else str(value))]


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
    set: tuple[str, ...] = ()
    """Override a value of the recipe, KEY=VALUE; repeatable."""


class PreviousRun(StrictModel):
    """The run that another one starts from: its folder, accuracy and recipe, its data and `Rejection`."""

    folder: Path
    accuracy: str
    recipe: dict[str, Any]
    classes: tuple[str, ...]
    num_images: int
    rejection: Rejection | None

    def changes(self, classes: Sequence[str], num_images: int) -> str:
        """Say what it reached and what *classes* and *num_images* add to it."""
        names = [name for name in classes if name not in self.classes]
        added = f"{num_images - self.num_images:+,} photographs" + f", new: {', '.join(names)}" * bool(names)
        return f"before, {self.folder}: {self.accuracy or 'accuracy not recorded'}; since then {added}"


class Configured(NamedTuple):
    """The recipe of a run, the keys that the caller has set, the run it starts from, and opened weights."""

    recipe: "Recipe"
    keys: list[str]
    previous: PreviousRun | None
    weights: "WeightSource | None"


def _show(result: "TrainedRun") -> None:
    """Print the result of the procedure, the frequent mistakes and the next command."""
    mistakes = [f"{count} x {true} predicted as {predicted}" for true, predicted, count in result.mistakes]
    worst = [f"most frequent mistakes: {', '.join(mistakes)}"] if mistakes else []
    say(*result.procedure.lines(), *worst, f"{result.seconds:.0f} s in total", f"page: {result.report}")
    if result.previous:
        say(result.previous)
    if result.decision is not None:
        say(*(f"{name}: {text}" for name, text in result.decision.rows()))
    say(f"next: sopdeploy export {result.best}{' --detach' * bool(result.training_only)}")


@command(_show, options={"data", "recipe", "out"})
@expand_options
def train(
    data: str | Path | None = None,
    recipe: str | Path | None = None,
    out: str | Path | None = None,
    *,
    options: TrainOptions,
    progress: bool | None = None,
    callback: "Callback | None" = None,
    **settings: Any,
) -> "TrainedRun":
    """Train a network; Ctrl-C and SIGTERM save and stop, --resume continues bit for bit.

    The run's report.html shows curves, confusions, calibration and the worst mistakes.

    Example: sopdeploy train --data photos/

    Example: sopdeploy train --data photos/ --from bundles/live

    Example: sopdeploy train --data photos/ --weights model.safetensors

    Example: sopdeploy train --recipe digits-dsop --set epochs=10

    Example: sopdeploy train --recipe digits-plain --set model.config.pooling=isqrt

    Args:
        data: Folder of images, DIR/<class>/*.jpg; sets `data.path`.
        recipe: A recipe of `sopdeploy recipes`, or a .toml file; by default that for photos.
        out: Folder of the run; by default runs/<project>-<number>. `runs/latest` links to it.
        progress: Print progress on stderr; by default only on a terminal and in a notebook.
        callback: Receives the events of the run.
        **settings: Values of the recipe, for example `epochs=5`, `optimizer={"lr": 0.1}` or
            `**{"optimizer.lr": 0.1}`. An empty dict adds an optional table with its defaults: `ema={}`.

    Returns:
        The files and metrics of the run.

    Raises:
        ConfigError: Unknown recipe or setting, an invalid value, or *out* holds another run.
        DataError: The images cannot be used.
        WeightsError: The start weights cannot be downloaded or read, or belong to another network.
        TrainingError: A loss or gradient is not finite. `TrainingStoppedError`, a subclass, after Ctrl-C or
            SIGTERM; the run is saved before.
    """
    data, out = (None if path is None else Path(path) for path in (data, out))
    _check(data, recipe, out, options, changed=bool(options.set or settings))
    from sopdeploy.checkpoint import read_checkpoint
    from sopdeploy.evaluation.decision_fit import describe_weakness
    from sopdeploy.report.page import PageWriter, TrainedRun
    from sopdeploy.training.callbacks import CallbackList
    from sopdeploy.training.distributed.strategy import Strategy, select_device
    from sopdeploy.training.distributed.torchrun import join_processes
    from sopdeploy.training.run_folder import numbered_folder
    from sopdeploy.training.train import train_recipe

    with ExitStack() as stack:
        stack.enter_context(join_processes())
        loaded, keys, before, weights = configure(data, recipe, options, settings)
        strategy = Strategy(select_device(loaded.device))
        resuming = options.resume != "never"
        folder = out or numbered_folder(str(loaded.project), strategy, resume=resuming)
        callbacks: list[Any] = []
        page = PageWriter(folder, CallbackList(callbacks))
        if is_main_process():
            if (err.is_terminal or err.is_jupyter) if progress is None else progress:
                callbacks.append(stack.enter_context(ProgressBars(err)))
            if callback is not None:
                callbacks.append(callback)
            callbacks.append(page)
        observer = CallbackList(callbacks)
        result = train_recipe(
            loaded,
            folder,
            resume="auto" if options.resume == "auto" else resuming,
            callback=observer,
            strategy=strategy,
            given=keys,
            weights=weights,
        )
        rule = None if result.decision is None else result.decision.rejection
        if weakness := describe_weakness(rule, None if before is None else before.rejection):
            observer.on_warning(weakness)
    text = ""
    if before is not None:
        labels = read_checkpoint(result.best).labels
        text = before.changes(labels, result.train_count + result.held_out_count)
    return TrainedRun(**dict(result), report=page.page, previous=text, mistakes=tuple(page.mistakes[:2]))


def _check(
    data: Path | None, recipe: str | Path | None, out: Path | None, options: TrainOptions, *, changed: bool
) -> None:
    """Raise the error of a path or a text that `train` cannot use, before torch is imported."""
    for assignment in options.set:
        parse_override(assignment)
    if recipe is not None:
        read_values(recipe)
    elif data is not None and not changed:
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


def read_previous(source: Path) -> PreviousRun:
    """Read the run at *source*, or that of the bundle at *source* from `runs`.

    Raises `ConfigError` if the run of a bundle is not there, and the errors of `read_checkpoint`.
    """
    from sopdeploy.checkpoint import read_checkpoint
    from sopdeploy.training.run_folder import RUNS

    best = source / "best.pt" if (source / "best.pt").is_file() else source
    expected = None
    if (source / MANIFEST).is_file():
        expected = read_manifest(source).origin
        best = RUNS / ("" if expected is None else expected.run) / "best.pt"
        if expected is None or not best.is_file():
            raise ConfigError(f"{source}: its run is not in {RUNS}; give the run", setting="from")
    checkpoint = read_checkpoint(best)
    origin, result = checkpoint.origin, read_result(checkpoint.training)
    if origin is None or result is None or (expected is not None and expected.run_id != origin.run_id):
        raise ConfigError(f"{best}: not the run to start from; give the run", setting="from")
    return PreviousRun(
        folder=best.parent,
        accuracy=dict(result.rows()).get("accuracy", ""),
        recipe=checkpoint.training["recipe"],
        classes=checkpoint.labels,
        num_images=origin.num_images,
        rejection=None if checkpoint.decision is None else checkpoint.decision.rejection,
    )


def configure(
    data: str | Path | None,
    recipe: str | Path | None,
    options: TrainOptions,
    settings: Mapping[str, Any] = {},
) -> Configured:
    """Read *recipe*, or that of the run to start from, with the given changes, and name its project.

    Without a recipe and a network, a weight file determines the network. Raises `ConfigError` if there are no
    data and no recipe, or if a value is invalid.
    """
    from sopdeploy.training.recipe import change_recipe, flatten
    from sopdeploy.training.start_weights import network_of_file

    if recipe is None and data is None:
        raise ConfigError("no training data", remedies={"data": None, "recipe": None})
    if recipe is not None and options.from_ is not None:
        raise ConfigError("not with a recipe, which the run has; omit one of them", setting="from")
    previous = None if options.from_ is None else read_previous(Path(options.from_))
    recorded = None if previous is None else previous.recipe
    source = recipe or FOLDER_RECIPE
    of_options = {
        "project": options.name,
        "data.path": data or None,
        "start.weights": options.weights,
        "rejection.unknown": options.unknown,
    }
    changes = [*map(parse_override, options.set), *flatten(settings)]
    changes += [(key, value) for key, value in of_options.items() if value is not None]
    loaded, keys = change_recipe(source, changes, recorded), [key for key, _ in changes]
    weights, source_file = None if loaded.start is None else loaded.start.weights, None
    if recipe is None and recorded is None and "model.name" not in keys and isinstance(weights, Path):
        network, source_file = network_of_file(weights, loaded.model.name)
        loaded = change_recipe(source, [*changes, ("model.name", network)])
    if loaded.project is None:
        path = getattr(loaded.data, "path", None)
        name = path and folder_project(path)
        name = name or folder_project(Path(source).with_suffix("")) or FOLDER_RECIPE
        loaded = loaded.model_copy(update={"project": name})
    return Configured(loaded, keys, previous, source_file)


@command()
def recipes() -> None:
    """List the packaged recipes.

    Example: sopdeploy recipes
    """
    summaries = ((name, tomllib.loads(recipe_text(name))["summary"]) for name in list_recipes())
    print_table(("recipe", "summary"), summaries)
