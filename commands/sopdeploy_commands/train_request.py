"""A request to train: options, recipe, changes and images, each read and checked once, as one value.

What needs no torch is checked first, so that a wrong path is an error at once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import pydantic

from sopdeploy.base.config import FieldValues, Options
from sopdeploy.base.files import BEST, expand_user
from sopdeploy.base.project import RUNS, Name, folder_project
from sopdeploy.data.photos.files import ANY_IMAGES, data_folder
from sopdeploy.data.photos.outputs import check_takes_output
from sopdeploy.errors import ConfigError, WeightsError
from sopdeploy.paths import describe_near, describe_wrong, what_is
from sopdeploy.training.settings.recipe_files import parse_override, read_values, select_by_name
from sopdeploy.weights.files import WeightPath, check_is_weights

if TYPE_CHECKING:
    from sopdeploy.training.settings.recipe import Recipe
    from sopdeploy.training.setup import Given, RunImages
    from sopdeploy.training.start_weights import WeightSource
    from sopdeploy.weights.checkpoint import Checkpoint

FOLDER_RECIPE = "photos"
NO_FILES = ("imagenet", "none")  # start weights that are not files
Changes = Sequence[tuple[str, Any]]  # of a recipe: keys and values


def _as_text(value: object) -> str | None:
    """Convert a path or a number, and join a list with commas, as the command line gives them."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return None if value is None else str(value)


Text = Annotated[str | None, pydantic.BeforeValidator(_as_text)]


class TrainOptions(Options):
    """Options of `sopdeploy.train` and `sopdeploy train`."""

    FORMER: ClassVar = {"pretrained": "weights"}
    ASSIGNED: ClassVar = {
        "model": (
            "model.name",
            str,
            "Network: a name of `sopdeploy models`, or timm:NAME; sets `model.name`.",
        ),
        "epochs": ("epochs", int, "Number of epochs."),
        "batch_size": ("batch_size", int, "Images of a training step."),
        "lr": ("optimizer.lr", float, "Learning rate; sets `optimizer.lr`."),
    }

    from_: Text = None
    """Start from the recipe of a run, or of a bundle whose run is in runs. Prints the accuracy of that run, and
    what was added since then."""
    pretrained: Text = None
    """Pretrained weights: imagenet, none (random), a checkpoint or a weight file; sets `start.weights`. By
    default imagenet for a folder of images without a recipe."""
    name: Name = None
    """Name of the project, by default the name of the data folder or of the recipe; sets `project`."""
    unknown: Text = None
    """Folder of images of none of the classes, which test the rejection. Of images that a server kept, only
    the uniform sample counts. Sets `rejection.unknown`."""
    resume: Literal["never", "always", "auto"] = "never"
    """Continue the run in the folder, by default the newest of the project; auto starts a new one if there is
    none."""
    dry_run: bool = False
    """Decode the images of the folder, report sizes, formats, classes, duplicates and unreadable files, and train
    nothing. Exit code 2 means that a training run could not use the images."""
    wrong_labels: Text = None
    """With a dry run, only list labels that are probably wrong, as this run on the folder predicts. If the run
    cannot tell, list the most doubtful labels."""
    tensorboard: bool = False
    """Also write the learning curves of the network and of each branch for TensorBoard, to the folder
    tensorboard of the run. Needs the package tensorboard."""
    set: tuple[str, ...] = ()
    """Override a value of the recipe, KEY=VALUE; repeatable."""

    @property
    def resumes(self) -> bool | Literal["auto"]:
        """Whether the run continues; "auto": if there is one."""
        return "auto" if self.resume == "auto" else self.resume == "always"


class RecipeChanges(NamedTuple):
    """A recipe, and what the user changes of it, read and parsed without torch.

    Attributes:
        source: The recipe, a name or a file; by default that for photos.
        values: Its values; None for those of the run to start from.
        is_named: Whether the user named the recipe.
        weights: The start weights that an option names.
        changes: The values of `--set`.
        settings: Values of the recipe, also as nested tables, that a Python program gives.
        options: Values of the recipe that other options set, by dotted key.
    """

    source: str | Path
    values: FieldValues | None
    is_named: bool
    weights: str | None
    changes: Changes
    settings: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def changes_data(self) -> bool:
        """Whether a change selects images, other than by the folder."""
        keys = [key for key, _ in self.changes] + list(self.settings)
        return any(key.partition(".")[0] == "data" for key in keys)


def read_changes(
    data: Path | None,
    recipe: str | Path | None,
    options: TrainOptions,
    settings: Mapping[str, Any] = {},
) -> RecipeChanges:
    """Read *recipe* and parse its changes; raises `ConfigError` if they cannot be combined."""
    if recipe is None and data is None:
        raise ConfigError("no training data", remedies={"data": None, "recipe": None})

    if recipe is not None and options.from_ is not None:
        raise ConfigError(
            "cannot be combined with a recipe, because the run has one; omit one of them",
            setting="from",
        )

    source = recipe or FOLDER_RECIPE
    settings = dict(select_by_name(key, value) for key, value in settings.items())

    # The values of the recipe that have options of their own
    set_by_options = {
        "project": options.name,
        "data.path": data,
        "rejection.unknown": options.unknown,
    }

    return RecipeChanges(
        source=source,
        values=None if options.from_ is not None else read_values(source),
        is_named=recipe is not None,
        weights=options.pretrained,
        changes=[*map(parse_override, options.set)],
        settings=settings,
        options={key: value for key, value in set_by_options.items() if value is not None},
    )


class TrainRequest(NamedTuple):
    """The recipe to train, with what is known of its run, and the run to start from."""

    recipe: "Recipe"
    given: "Given"
    previous: "Checkpoint | None"


def read_request(
    data: Path | None,
    recipe: str | Path | None,
    out: Path | None,
    options: TrainOptions,
    settings: Mapping[str, Any],
) -> TrainRequest:
    """Read the recipe, the run to start from, and the images; writes no file.

    Raises `ConfigError`, `DataError`, `WeightsError` and `CheckpointError` for what the user gave.
    """
    # They import numpy, which `train --help` does not need.
    from sopdeploy.data.folders.folder import open_folder
    from sopdeploy.data.photos.any_images import open_unknown

    # What a user may have mistyped, before torch is imported
    changes = read_changes(data, recipe, options, settings)

    if out is not None and out.is_file():
        raise ConfigError(f"{out} is a file; choose a folder", setting="out")

    unknown_folder = None if options.unknown is None else Path(options.unknown)
    if data is not None:
        check_takes_output(out or RUNS, "out", data_folder(data))
    if unknown_folder is not None:
        check_takes_output(out or RUNS, "out", data_folder(unknown_folder, ANY_IMAGES))

    if options.from_ is not None:
        _check_starts(Path(options.from_))

    start_file = None
    if options.pretrained is not None and options.pretrained not in NO_FILES:
        start_file = _check_weights(options.pretrained)

    # The images. Those of the folder are opened later if the recipe may say what is read of it.
    unknown = None if unknown_folder is None else open_unknown(unknown_folder)
    recipe_may_say = changes.values is None or changes.is_named or changes.changes_data
    data_of_folder = None if data is None or recipe_may_say else open_folder(data)

    # The recipe; from here on, torch is imported.
    from sopdeploy.training.setup import open_images

    previous = None if options.from_ is None else read_previous(Path(options.from_))
    configured, given = configure(changes, previous, start_file)
    run_images = open_images(configured, data_of_folder, unknown)
    _check_unknown(configured, run_images)
    return TrainRequest(configured, given._replace(images=run_images), previous)


def _check_unknown(recipe: "Recipe", images: "RunImages") -> None:
    """Raise `ConfigError` if the folder of unknown images has training images: what they tell means nothing."""
    from sopdeploy.data.photos.photo import ImageFiles  # imports numpy

    folder = recipe.rejection.unknown
    train = images.data.train
    if folder is None or not isinstance(train, ImageFiles):
        return
    unknown = folder.resolve()
    if any(train.path(index).resolve().is_relative_to(unknown) for index in range(len(train))):
        raise ConfigError(
            f"{folder}: has images of the classes, which are trained; give a folder of other images",
            setting="unknown",
        )


def _check_starts(source: Path) -> None:
    """Raise `ConfigError` unless *source* is a run, its checkpoint, or a bundle."""
    if not source.exists():
        near = describe_near(source) or "runs/index.html lists them"
        problem = f"no such run or bundle; {near}"
    elif what_is(source) in {"run", "checkpoint", "bundle"}:
        return
    else:
        problem = describe_wrong(source, "run")
    raise ConfigError(f"{source}: {problem}", setting="from")


def _check_weights(weights: str) -> WeightPath:
    """Check that *weights* name a weight file; raises `WeightsError`."""
    try:
        return check_is_weights(expand_user(weights))
    except WeightsError as error:
        raise WeightsError(
            f"{error}, or {' or '.join(NO_FILES)}", setting="pretrained"
        ) from error


def read_previous(source: Path) -> "Checkpoint":
    """Read the best checkpoint of a run; *source* is the run, its checkpoint, or a bundle exported from it.

    Raises `ConfigError` if the run of a bundle is not there or is another one by now, or if a
    checkpoint is not of a run, and the errors of `read_checkpoint`.
    """
    from sopdeploy.bundle.folder import follow_link, read_manifest
    from sopdeploy.training.records.results import read_result
    from sopdeploy.weights.checkpoint import read_checkpoint

    run = source
    run_id = None
    if what_is(source) == "bundle":  # it names its run
        manifest = read_manifest(follow_link(source))
        exported_from = manifest.origin
        if exported_from is None or not (RUNS / exported_from.run / BEST).is_file():
            run_name = "its run" if exported_from is None else f"its run {exported_from.run}"
            raise ConfigError(
                f"{source}: {run_name} is not in {RUNS}; put it back, or start afresh without --from "
                f"and with --name {quote(manifest.project)}",
                setting="from",
            )
        run = RUNS / exported_from.run
        run_id = exported_from.run_id

    # *source* can be the checkpoint itself
    best = run / BEST if (run / BEST).is_file() else run
    checkpoint = read_checkpoint(best)
    origin = checkpoint.origin
    is_of_run = origin is not None and read_result(checkpoint.training) is not None

    # By now, a later run may have the folder that the bundle names.
    is_same_run = run_id is None or (origin is not None and origin.run_id == run_id)
    if not (is_of_run and is_same_run):
        raise ConfigError(f"{best}: not the run to start from; give the run", setting="from")
    return checkpoint


def configure(
    recipe_changes: RecipeChanges,
    previous: "Checkpoint | None" = None,
    start_file: WeightPath | None = None,
) -> "tuple[Recipe, Given]":
    """Apply *recipe_changes* to their recipe or that of the *previous* run; name the project.

    Without a recipe and a network, a weight file determines the network. *start_file* is the
    file of the start weights that an option gave, which is checked. Returns the recipe and what
    is known of its run, without its images. Raises `ConfigError` if a value is invalid, and
    `WeightsError` for a weight file that cannot be read.
    """
    from sopdeploy.training.settings.head import HeadOptions
    from sopdeploy.training.settings.recipe import change_recipe, flatten
    from sopdeploy.training.setup import Given
    from sopdeploy.weights.conversion import WeightFile
    from sopdeploy.weights.import_weights import network_of_weights, open_weights

    # The recipe with all changes
    values = recipe_changes.values if previous is None else previous.training["recipe"]
    changes = [
        *recipe_changes.changes,
        *flatten(recipe_changes.settings),
        *recipe_changes.options.items(),
    ]
    if recipe_changes.weights is not None:
        changes.append(("start.weights", recipe_changes.weights))
    source = str(recipe_changes.source)
    changed = dict(flatten(dict(changes)))
    changes += _choose_data_kind(values or {}, changed)
    recipe = change_recipe(values or {}, changes, source)

    # With a previous run, margins protect its classes from new ones of few photographs.
    protects = previous is not None and "procedure.margins" not in changed
    if protects and isinstance(recipe.procedure, HeadOptions):
        procedure = recipe.procedure.model_copy(update={"margins": True})
        recipe = recipe.model_copy(update={"procedure": procedure})

    # If nobody names the network, the weights determine it: their file is read here, and its
    # content is kept for the run in place of the file.
    start_weights = None if recipe.start is None else recipe.start.weights
    names_network = recipe_changes.is_named or previous is not None or "model.name" in changed
    weights: WeightSource | None = start_file
    if not names_network and isinstance(start_weights, Path):
        path = expand_user(start_weights)
        if start_file is None and path.is_file():
            start_file = check_is_weights(path)
        weights = None if start_file is None else open_weights(start_file)
        if isinstance(weights, WeightFile):
            name = network_of_weights(weights, recipe.model.name)
            if name != recipe.model.name:
                recipe = change_recipe(values or {}, [*changes, ("model.name", name)], source)

    if recipe.project is None:
        recipe = recipe.model_copy(update={"project": _name_project(recipe, source)})
    decision = None if previous is None else previous.decision
    rule_before = None if decision is None else decision.rejection
    return recipe, Given(changed, weights, rule_before=rule_before)


def _choose_data_kind(values: FieldValues, changed: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Choose the data source for a folder that *changed* values name, unless they name the source, too.

    *values* come from the recipe. Its data source stays if it reads the folder (`kind_of_folder`).
    """
    from sopdeploy.data.sources import kind_of_folder

    path = changed.get("data.path")
    data = values.get("data")
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(path, str | Path) or kind is None or "data.kind" in changed:
        return []  # the validation of the recipe names a value of a wrong type

    folder = expand_user(path)
    return [("data.kind", kind_of_folder(folder, str(kind)))] if folder.is_dir() else []


def _name_project(recipe: "Recipe", source: str) -> str:
    """Name the project of *recipe* like its data or, without a name of theirs, like its *source*."""
    folder = recipe.data_folder
    project = "" if folder is None else folder_project(folder)
    return project or folder_project(Path(source).with_suffix("")) or FOLDER_RECIPE
