"""`sopdeploy.train`, `sopdeploy train` and `sopdeploy recipes`."""

import re
import tomllib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import pydantic

from sopdeploy.cli.command import command, expand_options
from sopdeploy.cli.console import ProgressBars, err, print_table, say
from sopdeploy.config import Options
from sopdeploy.environment import is_main_process
from sopdeploy.errors import ConfigError, WeightsError, amount, shorten
from sopdeploy.files import WeightPath, check_is_weights, expand_user, has_manifest
from sopdeploy.models.choices import file_stem, read_choices
from sopdeploy.photos.files import check_takes_output
from sopdeploy.photos.folder import open_any_images, open_folder
from sopdeploy.photos.photo import Split
from sopdeploy.project import RUNS, Name, folder_project
from sopdeploy.training.recipe_files import (
    list_recipes,
    parse_override,
    read_values,
    recipe_text,
)
from sopdeploy.training.results import NetworkScore, read_result

if TYPE_CHECKING:
    from sopdeploy.checkpoint import Checkpoint
    from sopdeploy.training.callback import Callback
    from sopdeploy.training.checkpoints import Setup
    from sopdeploy.training.recipe import Recipe
    from sopdeploy.training.setup import Given
    from sopdeploy.training.start_weights import WeightSource
    from sopdeploy.training.train import TrainingResult

FOLDER_RECIPE = "photos"
RECIPE_NETWORK = (
    ""  # stands for the name of the only network, that of the recipe, if none is chosen
)
NO_FILES = ("imagenet", "none")  # start weights that are no file
RESUME: dict[str, bool | Literal["auto"]] = {"never": False, "always": True, "auto": "auto"}


def _as_text(value: object) -> str | None:
    """Convert a path or a number, and join a list with commas, as the command line gives them."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return None if value is None else str(value)


Text = Annotated[str | None, pydantic.BeforeValidator(_as_text)]


class TrainOptions(Options):
    """Options of `sopdeploy.train` and `sopdeploy train`."""

    from_: Text = None
    """A run, or a bundle whose run is in runs: start from its recipe, and print its accuracy and what was
    added since."""
    models: Text = None
    """Networks, separated by commas: train the most accurate one by cross-validation."""
    within: Text = None
    """Of `--models`, only those that need at most this time for an image on one thread here, such as 20ms.
    Without `--models`, of the networks of a list; those whose weights cannot be reached are
    skipped."""
    weights: Text = None
    """Start weights: imagenet, none (random), a checkpoint or a weight file; sets `start.weights`. By default
    imagenet for a folder of images without a recipe. With several networks, one for each,
    separated by commas, or a folder of files that are named like the networks."""
    name: Name = None
    """Name of the project, by default that of the data folder or of the recipe; sets `project`."""
    unknown: Text = None
    """Folder of images of none of the classes, which test the rejection; of those that a server kept, only
    the uniform sample counts. Sets `rejection.unknown`."""
    resume: Literal["never", "always", "auto"] = "never"
    """Continue the run in the folder, by default the newest of the project; auto starts a new one if there is
    none."""
    set: tuple[str, ...] = ()
    """Override a value of the recipe, KEY=VALUE; repeatable."""

    def per_network(self, settings: Mapping[str, Any] = {}) -> "dict[str, TrainOptions]":
        """Return the options that train each network alone, by its name.

        The networks are those of `models`, or with `within` alone those of the built-in list;
        without both, these options have the name `RECIPE_NETWORK`. *settings*, further values
        of the recipe, are only checked: they may not name a network. If `weights` is a folder,
        networks of the built-in list without a file in it are left out. Raises `ConfigError`
        for another number of `weights` than of networks, and for options that do not fit
        together, and `WeightsError` if a network of `models`, or each of the built-in list, has
        no file in the folder.
        """
        if not self.compares:
            return {RECIPE_NETWORK: self}

        setting = "within" if self.models is None else "models"
        if self.resume != "never":
            raise ConfigError(
                "not with resume, which continues the network of a run", setting=setting
            )
        if self.within is not None:
            _parse_milliseconds(self.within)  # raises the error of an invalid time

        changes = [*map(parse_override, self.set), *settings.items()]
        tables = [
            value for key, value in changes if key == "model" and isinstance(value, Mapping)
        ]
        if any(key == "model.name" for key, _ in changes) or any(
            "name" in table for table in tables
        ):
            raise ConfigError("not with model.name, the name of one network", setting=setting)

        # One copy of the options for each network, with its name, its weights and its size of
        # images.
        options = {}
        resized = {one.name: one.pixels for one in read_choices().networks if one.resized}
        for name, weights in self._weights_by_network().items():
            size = [f"preprocess.crop={resized[name]}"] if name in resized else []
            assignments = (*size, *self.set, f"model.name={name}")
            single = {"models": None, "within": None, "weights": weights, "set": assignments}
            options[name] = self.model_copy(update=single)

        return options

    @property
    def compares(self) -> bool:
        """Whether several networks are compared."""
        return self.models is not None or self.within is not None

    def networks(self) -> list[str]:
        """Return the names of the networks to compare: `models`, or those of the list."""
        if self.models is not None:
            return [name.strip() for name in self.models.split(",")]
        return [choice.name for choice in read_choices().networks]

    def _weights_by_network(self) -> dict[str, str | None]:
        """Divide `weights` among the networks; those of the built-in list without a file are left out."""
        names = self.networks()
        if self.weights is None or self.weights in NO_FILES:  # the same for every network
            return dict.fromkeys(names, self.weights)

        # A folder has a file for each network, which it names; a list has them in the order of
        # the networks.
        if (folder := expand_user(self.weights)).is_dir():
            by_stem = {path.stem: str(path) for path in sorted(folder.iterdir())}
            by_network = {name: by_stem.get(file_stem(name)) for name in names}
            missing = [name for name, file in by_network.items() if file is None]
            if missing and (self.models is not None or len(missing) == len(names)):
                advice = f"name files like {file_stem(missing[0])}.safetensors"
                problem = f"there are no weights of {shorten(missing)}; {advice}"
                raise WeightsError(f"{folder}: {problem}", setting="weights")
            return {name: file for name, file in by_network.items() if file is not None}

        files = [file.strip() for file in self.weights.split(",")]
        if len(files) != len(names):
            message = f"{len(files)} for {len(names)} networks; give a folder, or one for each with commas"
            raise ConfigError(message, setting="weights")
        return dict(zip(names, files, strict=True))


def print_result(result: "TrainingResult") -> None:
    """Print the results, the page about them, the time and the next command."""
    if result.networks:
        print_table(NetworkScore.COLUMNS, (network.row() for network in result.networks))
    say(*result.procedure.lines())

    if result.mistakes:
        texts = [
            f"{count} x {true} predicted as {predicted}"
            for true, predicted, count in result.mistakes
        ]
        say(f"most frequent mistakes: {', '.join(texts)}")

    if result.decision is not None:
        say(*(f"{name}: {text}" for name, text in result.decision.rows()))
    if result.previous:
        say(result.previous)

    steps = result.procedure.describe_time()
    time = f"{result.seconds:.0f} s in total" + (f" ({steps})" if steps else "")
    say(
        f"page: {result.report}",
        time,
        f"next: sopdeploy export {quote(str(result.best))} --detach",
    )


@command(print_result, options={"data", "recipe", "out"}, distributed=True)
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
) -> "TrainingResult":
    """Train an image classifier on a folder of images with one subfolder per class.

    It prints the accuracy to expect on new images, and writes best.pt, which `sopdeploy export`
    converts, and report.html, which shows confusions and the worst mistakes. Ctrl-C and SIGTERM
    save and stop; `--resume always` continues bit for bit.

    Example: sopdeploy train --data photos/

    Example: sopdeploy train --data photos/ --from bundles/live

    Example: sopdeploy train --data photos/ --weights model.safetensors

    Example: sopdeploy train --data photos/ --within 20ms

    Example: sopdeploy train --recipe digits-dsop --set epochs=10

    Example: sopdeploy train --recipe digits-plain --set model.config.pooling=isqrt

    Args:
        data: Folder of images, DIR/<class>/*.jpg; sets `data.path`.
        recipe: A recipe of `sopdeploy recipes`, or a .toml file; by default that for photos.
        out: Folder of the run; by default runs/<project>-<number>. `runs/latest` links to it.
        progress: Print progress on stderr; by default only on a terminal and in a notebook.
        callback: Receives the events of the run, instead of the progress display.
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
    data = None if data is None else Path(data)
    out = None if out is None else Path(out)

    networks_to_train, previous = read_request(data, recipe, out, options, settings)

    from sopdeploy.evaluation.decision_fit import describe_weakness
    from sopdeploy.report.page import PAGE, write_run_page
    from sopdeploy.training.callback import Callback
    from sopdeploy.training.checkpoints import IN_USE, RunFolder, numbered_folder
    from sopdeploy.training.distributed import Strategy, join_processes, select_device
    from sopdeploy.training.train import summarize_run, train_run
    from sopdeploy_commands.training.runs import list_runs_before

    with ExitStack() as stack:
        stack.enter_context(join_processes())

        # The user's callback, bars on a terminal, or nothing.
        observer: Any = callback or Callback()
        shown = (err.is_terminal or err.is_jupyter) if progress is None else progress
        draws_bars = callback is None and shown and is_main_process()
        if draws_bars:
            observer = stack.enter_context(ProgressBars(err))

        networks: tuple[NetworkScore, ...] = ()  # those that were compared

        # Of several networks, the fastest of those with the best cross-validated score.
        chosen = RECIPE_NETWORK
        if options.compares:
            from sopdeploy_commands.training.network_choice import choose_network

            within = None if options.within is None else _parse_milliseconds(options.within)
            # Raises the error of another run there before minutes of measurements
            if out is not None:
                RunFolder(out, Strategy(select_device("auto"))).open(resume=False)
            if skipped := [
                name for name in options.networks() if name not in networks_to_train
            ]:
                observer.on_warning(
                    f"skipped, because {options.weights} lacks them: {', '.join(skipped)}"
                )
            networks = choose_network(
                networks_to_train, within, observer, may_skip=options.models is None
            )
            chosen = next(network.name for network in networks if network.chosen)

        selected, given = networks_to_train[chosen]
        strategy = Strategy(select_device(selected.device))
        resume = RESUME[options.resume]
        options_of_run = {"resume": resume, "callback": observer, "strategy": strategy}

        # Reserve the next folder `runs/NAME-N` and train in it.
        while True:
            folder = out or numbered_folder(
                str(selected.project), strategy, resume=bool(resume)
            )
            try:
                run = train_run(selected, folder, given=given, **options_of_run)
                break
            except ConfigError as error:  # another process was faster to take this number
                if error.code != IN_USE or out is not None or resume:
                    raise

        if not is_main_process():
            return summarize_run(run, folder)

        def on_image(done: int, total: int) -> None:
            observer.on_stage(name="report", done=done, total=total)

        before = list_runs_before(folder, selected.project)

        # The most frequent ones first
        mistakes = write_run_page(run, folder, on_image, networks, before)

        # A decision rule can be weak by itself, or weaker than that of the run before.
        decisions = (run.fit.decision, None if previous is None else previous.decision)
        rule, rule_before = (
            None if decision is None else decision.rejection for decision in decisions
        )
        if weakness := describe_weakness(rule, rule_before):
            observer.on_warning(weakness)

    changes = "" if previous is None else _describe_changes(previous, run.setup)
    page = {"report": folder / PAGE, "mistakes": tuple(mistakes[:2]), "previous": changes}
    return summarize_run(run, folder, networks, **page)


class TrainRequest(NamedTuple):
    """The recipe of each network to train, with what is known of its run, and the run to start from."""

    networks: "dict[str, tuple[Recipe, Given]]"
    previous: "Checkpoint | None"


def read_request(
    data: Path | None,
    recipe: str | Path | None,
    out: Path | None,
    options: TrainOptions,
    settings: Mapping[str, Any],
) -> TrainRequest:
    """Read the recipe of each network and the run to start from; writes no file.

    First raises the error of a path or a text that `train` cannot use, before torch is
    imported.
    """
    opened = None
    for assignment in options.set:
        # For its errors; the values are read in `configure`, with the recipe
        parse_override(assignment)

    if recipe is not None:
        read_values(recipe)  # for its errors, too
    # changes may need images of another form
    elif data is not None and not options.set and not settings:
        opened = open_folder(data)
    if out is not None and out.is_file():
        raise ConfigError(f"{out} is a file; choose a folder", setting="out")
    unknown = None if options.unknown is None else Path(options.unknown)
    for images in filter(None, (data, unknown)):
        check_takes_output(out or Path("runs"), "out", images)

    if options.from_ is not None and not Path(options.from_).exists():
        message = f"{options.from_}: no such run or bundle; `sopdeploy runs` lists them"
        raise ConfigError(message, setting="from")
    options_by_network = options.per_network(settings)

    # The start weights must be weight files before torch is imported, which takes seconds.
    start_files = {}  # by network
    for name, network_options in options_by_network.items():
        weights = network_options.weights
        if weights is not None and weights not in NO_FILES:
            try:
                start_files[name] = check_is_weights(expand_user(weights))
            except WeightsError as error:
                raise WeightsError(
                    f"{error}, or {' or '.join(NO_FILES)}", setting="weights"
                ) from error

    if unknown is not None:
        open_any_images(unknown)  # raises its errors

    previous = None
    if options.from_ is not None:
        previous = read_previous(Path(options.from_))
        opened = None  # what is opened above was only checked: this recipe may select classes

    # Only now the recipes, which need the photographs, the previous run and the weights.
    networks = {}
    for name, network_options in options_by_network.items():
        start_file = start_files.get(name)
        networks[name] = configure(
            data, recipe, network_options, settings, previous, opened, start_file
        )

    return TrainRequest(networks, previous)


def _parse_milliseconds(text: str) -> float:
    """Convert a time such as "20ms" to a number; raise `ConfigError` for another text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?ms", text)
    if match is None:
        raise ConfigError(
            f"{text!r} is no time; give milliseconds, such as 20ms", setting="within"
        )
    return float(match[1])


def read_previous(source: Path) -> "Checkpoint":
    """Read the best checkpoint of the run that *source* gives.

    *source* is the run, its checkpoint, or a bundle that was exported from it. Raises
    `ConfigError` if the run of a bundle is not there or is another one by now, or if a
    checkpoint is not of a run, and the errors of `read_checkpoint`.
    """
    from sopdeploy.bundle.folder import read_manifest
    from sopdeploy.checkpoint import read_checkpoint

    run = source
    run_id = None
    if has_manifest(source):  # a bundle names its run
        exported_from = read_manifest(source).origin
        if exported_from is None or not (RUNS / exported_from.run / "best.pt").is_file():
            raise ConfigError(
                f"{source}: its run is not in {RUNS}; give the run", setting="from"
            )
        run = RUNS / exported_from.run
        run_id = exported_from.run_id

    # *source* can be the checkpoint itself
    best = run / "best.pt" if (run / "best.pt").is_file() else run
    checkpoint = read_checkpoint(best)
    origin = checkpoint.origin
    is_of_run = origin is not None and read_result(checkpoint.training) is not None

    # By now, a later run may have the folder that the bundle names.
    is_same_run = run_id is None or (origin is not None and origin.run_id == run_id)
    if not (is_of_run and is_same_run):
        raise ConfigError(f"{best}: not the run to start from; give the run", setting="from")
    return checkpoint


def _describe_changes(before: "Checkpoint", setup: "Setup") -> str:
    """Say what the run *before* reached, and what *setup* adds; empty if it is not known."""
    result_before = read_result(before.training)
    origin = before.origin
    if result_before is None or origin is None:
        return ""

    names = [name for name in setup.labels if name not in before.labels]
    added = len(setup.data.train) + len(setup.data.held_out) - origin.num_images
    new = f", new: {', '.join(names)}" if names else ""
    accuracy = dict(result_before.rows())["accuracy"]
    return (
        f"before, {origin.run}: {accuracy}; since then {amount(added, 'photograph', '+')}{new}"
    )


def configure(
    data: Path | None,
    recipe: str | Path | None,
    options: TrainOptions,
    settings: Mapping[str, Any] = {},
    previous: "Checkpoint | None" = None,
    opened: Split | None = None,
    start_file: WeightPath | None = None,
) -> "tuple[Recipe, Given]":
    """Read *recipe*, or that of the *previous* run, with the given changes, and name its project.

    Without a recipe and a network, a weight file determines the network. Returns the recipe,
    and what is known: *opened* are the data, if they are opened, and *start_file* is the file
    of the start weights, if it is checked. Raises `ConfigError` if there are no data and no
    recipe, or if a value is invalid.
    """
    from sopdeploy.importers.conversion import WeightFile
    from sopdeploy.importers.import_weights import network_of_weights, open_weights
    from sopdeploy.training.recipe import HeadOptions, change_recipe, flatten
    from sopdeploy.training.setup import Given

    if recipe is None and data is None:
        raise ConfigError("no training data", remedies={"data": None, "recipe": None})
    if recipe is not None and previous is not None:
        raise ConfigError(
            "not with a recipe, which the run has; omit one of them", setting="from"
        )
    previous_recipe = None if previous is None else previous.training["recipe"]

    source = recipe or FOLDER_RECIPE  # without a previous recipe, this one is read

    # Options are changes of the recipe, as `--set` is.
    option_values = {
        "project": options.name,
        "data.path": data,
        "start.weights": options.weights,
        "rejection.unknown": options.unknown,
    }
    changes = [*map(parse_override, options.set), *flatten(settings)]
    changes += [(key, value) for key, value in option_values.items() if value is not None]

    changed = change_recipe(source, changes, previous_recipe)
    keys = [key for key, _ in flatten(dict(changes))]

    # The classes of the previous run
    protects = previous is not None and "procedure.margins" not in keys
    if protects and isinstance(changed.procedure, HeadOptions):
        procedure = changed.procedure.model_copy(update={"margins": True})
        changed = changed.model_copy(update={"procedure": procedure})
    start_weights = None if changed.start is None else changed.start.weights
    names_network = recipe is not None or previous_recipe is not None or "model.name" in keys
    weights: WeightSource | None = start_file

    # Then the weights determine the network
    if not names_network and isinstance(start_weights, Path):
        path = expand_user(start_weights)
        if start_file is None and path.is_file():
            start_file = check_is_weights(path)
        weights = None if start_file is None else open_weights(start_file)
        if isinstance(weights, WeightFile):
            network = network_of_weights(weights, changed.model.name)
            if network != changed.model.name:
                changed = change_recipe(source, [*changes, ("model.name", network)])

    # The name of the folder of images or of the recipe, unless one is set.
    if changed.project is None:
        folder = getattr(changed.data, "path", None)
        project = "" if folder is None else folder_project(folder)
        project = project or folder_project(Path(source).with_suffix("")) or FOLDER_RECIPE
        changed = changed.model_copy(update={"project": project})

    return changed, Given(keys, weights, opened)


@command()
def recipes() -> None:
    """List the packaged recipes.

    Example: sopdeploy recipes
    """
    summaries = ((name, tomllib.loads(recipe_text(name))["summary"]) for name in list_recipes())
    print_table(("recipe", "summary"), summaries)
