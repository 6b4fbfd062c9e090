"""Train a network, `sopdeploy.train` and `sopdeploy train`, and the result."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from sopdeploy.api.options import TrainOptions
from sopdeploy.api.progress import ProgressBars
from sopdeploy.bundle.folder import MANIFEST, read_manifest
from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.config import StrictModel, expand_options
from sopdeploy.data.base import Split
from sopdeploy.decision import Rejection
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.decision_fit import describe_weakness
from sopdeploy.project import folder_project
from sopdeploy.training.callbacks import Callback, CallbackList, TensorBoard
from sopdeploy.training.distributed.strategy import Strategy, select_device
from sopdeploy.training.distributed.torchrun import is_main_process, join_processes
from sopdeploy.training.recipe import Recipe, change_recipe, flatten
from sopdeploy.training.recipe_files import parse_override
from sopdeploy.training.results import read_result
from sopdeploy.training.run import Run
from sopdeploy.training.run_folder import RUNS, numbered_folder
from sopdeploy.training.start_weights import WeightSource, network_of_file
from sopdeploy.training.train import TrainingResult, train_recipe

FOLDER_RECIPE = "photos"


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

    recipe: Recipe
    keys: list[str]
    previous: PreviousRun | None
    weights: WeightSource | None


class TrainedRun(TrainingResult):
    """The files and metrics of a finished run.

    Attributes:
        report: The page about the run.
        previous: The run that it started from, and what was added since.
        mistakes: The two most frequent ones: true class, predicted class, number of images.
    """

    report: Path
    previous: str = ""
    mistakes: tuple[tuple[str, str, int], ...] = ()


class PageWriter(Callback):
    """Write the page about a finished run to the folder of the run; *progress* shows its evaluation."""

    def __init__(self, folder: Path, progress: Callback) -> None:
        self.best, self.page, self.progress = folder / "best.pt", folder / "report.html", progress
        self.mistakes: list[tuple[str, str, int]] = []

    def on_train_end(self, *, run: Run, data: Split) -> None:
        """Evaluate the best network and write the page."""
        from sopdeploy.report.page import write_run_page

        def on_image(done: int, total: int) -> None:
            self.progress.on_stage(name="report", done=done, total=total)

        self.mistakes = write_run_page(run, data, self.best, self.page, on_image)


@expand_options
def train(
    data: str | Path | None = None,
    recipe: str | Path | None = None,
    out: str | Path | None = None,
    *,
    options: TrainOptions,
    assignments: Sequence[str] = (),
    progress: bool | None = None,
    callback: Callback | None = None,
    **settings: Any,
) -> TrainedRun:
    """Train a network with a recipe and write the run and a page about it to a folder.

    Args:
        data: Folder of images, `DIR/<class>/*.jpg`. It sets `data.path` of the recipe.
        recipe: A recipe of `sopdeploy recipes`, or a .toml file. The default is the recipe for photos.
        out: Folder of the run. The default is `runs/<project>-<number>`; `runs/latest` links to it.
        assignments: Settings as text, `key=value`, as for the option `--set`.
        progress: Print progress on stderr. By default only on a terminal and in a notebook.
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
    with ExitStack() as stack:
        stack.enter_context(join_processes())
        loaded, keys, before, weights = configure(data, recipe, options, assignments, settings)
        strategy = Strategy(select_device(loaded.device))
        resuming = options.resume != "never"
        folder = numbered_folder(str(loaded.project), strategy, resume=resuming) if out is None else Path(out)
        callbacks: list[Any] = []
        page = PageWriter(folder, CallbackList(callbacks))
        if is_main_process():
            if options.tensorboard:
                callbacks.append(TensorBoard(folder))
            console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
            if (console.is_terminal or console.is_jupyter) if progress is None else progress:
                callbacks.append(stack.enter_context(ProgressBars(console)))
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


def read_previous(source: Path) -> PreviousRun:
    """Read the run at *source*, or that of the bundle at *source* from `runs`.

    Raises `ConfigError` if the run of a bundle is not there, and the errors of `read_checkpoint`.
    """
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
    assignments: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> Configured:
    """Read *recipe*, or that of the run to start from, with the given changes, and name its project.

    Without a recipe and a network, a weight file determines the network. Raises `ConfigError` if there are no
    data and no recipe, or if a value is invalid.
    """
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
    changes = [*map(parse_override, assignments), *flatten(settings or {})]
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
