"""Recipes: complete training configurations in TOML files.

`--set optimizer.lr=0.05` overrides single values. For an unknown key the error names the
closest known one.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args

import pydantic
from pydantic.fields import FieldInfo

from sopdeploy.base.config import Count, FieldValues, StrictModel, first_problem
from sopdeploy.base.files import BEST
from sopdeploy.base.nearest import did_you_mean
from sopdeploy.base.plugins import DATA_SOURCES
from sopdeploy.base.project import Name
from sopdeploy.bundle.decision import ACCEPTS
from sopdeploy.data.augment import Augmentations
from sopdeploy.data.sources import DataConfig, FolderConfig, OwnDataConfig
from sopdeploy.errors import ConfigError, with_hint
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import CatalogModel, entry
from sopdeploy.training.settings.head import (
    FeatureSettings,
    FewShotConfig,
    FineTuneConfig,
    HeadOptions,
)
from sopdeploy.training.settings.loop import (
    LoopSettings,
    StartConfig,
    StartWeights,
)
from sopdeploy.training.settings.recipe_files import (
    add_fine_tune_settings,
    parse_override,
    procedure_kind,
    read_values,
    set_value,
)

# The recipe keys that may change when a run is resumed. The images themselves are compared, so that a
# folder that is asked about now, but was not when the run began, can be read as it was.
CHANGEABLE_KEYS = {
    "summary",
    "workers",
    "threads",
    "device",
    "data.path",
    "data.classes_from",
    "data.leave_out",
    "start.weights",
    "save.every_minutes",
    "rejection.accepts",
    "rejection.unknown",
}


class LoopConfig(StrictModel):
    """Train all weights, or those that `start.learn` names, for several epochs; see `LoopSettings`."""

    kind: Literal["loop"] = "loop"


class AutoConfig(StrictModel):
    """Select `few_shot` for up to `FEW_IMAGES` training images, otherwise `loop`; see `select_procedure`."""

    kind: Literal["auto"] = "auto"


Part = TypeVar("Part", bound=StrictModel)
ProcedureConfig = AutoConfig | LoopConfig | FewShotConfig | FineTuneConfig
AnyProcedureConfig = Annotated[ProcedureConfig, pydantic.Field(discriminator="kind")]


class ModelConfig(CatalogModel):
    """The network to train: a model of the catalog, and the fields of its config that are not defaults.

    `remove_branches_at` is an ablation: the branches are removed at this epoch (from 0), or
    kept (None).
    """

    remove_branches_at: Count | None = None

    @pydantic.model_validator(mode="after")
    def _check_branches(self) -> "ModelConfig":
        if self.remove_branches_at is None:
            return self
        if "branches" not in entry(self.name).network.training_only:
            raise ValueError(f"remove_branches_at: {self.name} has no branches")
        return self


class RejectionConfig(StrictModel):
    """The fraction of known images to accept; with 1 no image counts as unknown.

    `unknown` is a folder of images of no class, which test the rejection.
    """

    accepts: Annotated[float, pydantic.Field(gt=0, le=1)] = ACCEPTS
    unknown: Path | None = None


class Recipe(FeatureSettings):
    """The settings that every procedure reads; subclasses add those of a procedure.

    `project` names the bundle and the served model; `train` sets it by the data folder, or by
    the recipe. `threads` is the number of CPU threads of torch; 0 keeps torch's default.
    """

    summary: str
    project: Name = None
    procedure: AnyProcedureConfig = LoopConfig()
    threads: Annotated[int, pydantic.Field(ge=0, le=1024)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig
    start: StartWeights | None = None
    rejection: RejectionConfig = RejectionConfig()

    def part(self, settings: type[Part]) -> Part:
        """Return the *settings* of one component, which are fields of the recipe, without all others."""
        values = {name: getattr(self, name) for name in settings.model_fields}
        return cast("Part", settings.model_construct(**values))

    @property
    def data_folder(self) -> Path | None:
        """The folder of the images; some data sources have none."""
        folder: Path | None = getattr(self.data, "path", None)
        return folder

    @property
    def head_options(self) -> HeadOptions:
        """The options of the procedure, which fits a classifier to features of a frozen network."""
        if not isinstance(self.procedure, HeadOptions):
            raise TypeError(
                f"the procedure {self.procedure.kind} does not fit such a classifier"
            )
        return self.procedure

    @property
    def starts_random(self) -> bool:
        """Whether all weights of the network are random at the start."""
        return self.start is None or self.start.weights == "none"

    @property
    def groups_by_name(self) -> bool:
        """Whether the user groups images by their names, so that the names need no interpretation."""
        return isinstance(self.data, FolderConfig) and bool(self.data.groups)

    @property
    def training_crop(self) -> int:
        """Side of the training images in pixels."""
        return self.preprocess.crop


class FewShotRecipe(Recipe):
    """A linear classifier on features of a frozen network."""

    procedure: FewShotConfig


class LoopRecipe(Recipe, LoopSettings):
    """The training loop, also from a fitted head (`fine_tune`), or a choice (`auto`).

    Defaults follow the papers.
    """

    model: ModelConfig
    start: StartConfig | None = None  # of `UpdateSettings`; others read only its weights

    @property
    def training_crop(self) -> int:
        """Side of the training images in pixels, which are augmented."""
        return self.part(Augmentations).crop_of(self.preprocess)

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> "LoopRecipe":
        """Check settings of different components against each other."""
        if self.optimizer.needs_whole_step:
            other = {
                "grad_accum_steps": self.grad_accum_steps > 1,
                "precision": self.precision == "fp16",
                "compile": self.compile,
            }
            for name in (name for name, is_set in other.items() if is_set):
                raise ValueError(
                    f"{name}: {self.optimizer.kind} needs second derivatives of a whole step; omit "
                    "it, or choose another optimizer.kind"
                )

        removal = self.model.remove_branches_at
        if removal is not None and removal >= self.epochs:
            raise ValueError(
                f"model.remove_branches_at: the run has only {self.epochs} epochs; "
                "give an earlier epoch"
            )
        if removal is not None and self.frozen_backbone:
            raise ValueError(
                "model.remove_branches_at: nothing would learn after it with "
                "start.learn = branches"
            )

        if not self.first_phase:
            return self
        if self.first_phase >= self.epochs:
            raise ValueError(
                f"start.classifier_epochs: the run has only {self.epochs} epochs; "
                "give fewer than these"
            )

        if self.start is not None and self.start.learn in ("branches", "classifier"):
            raise ValueError(
                "start.classifier_epochs: the classifier does not learn "
                f"first with start.learn = {self.start.learn}; give all or "
                "last_stages"
            )
        if self.teacher is not None and self.teacher.weights is None:
            raise ValueError(
                "start.classifier_epochs: a teacher that is trained jointly needs "
                "one phase; set it to 0"
            )

        return self


def read_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe *source* and change it by *overrides*, texts for `parse_override`."""
    changes = [parse_override(override) for override in overrides]
    return change_recipe(read_values(source), changes, str(source))


def change_recipe(
    base: Mapping[str, Any], changes: Sequence[tuple[str, Any]], source: str
) -> Recipe:
    """Build the recipe of the values *base*, those of the recipe *source* or of a run, with *changes*.

    *changes* are dotted keys with their values. If they select another network, data source or
    procedure, options that the selected one does not have are dropped. Selecting `fine_tune`
    adds `FINE_TUNE_SETTINGS`, which other *changes* override. Selecting a loop adds what *base* lacks,
    as it is in the recipe `photos`. If `preprocess.crop` changes alone, `preprocess.resize` keeps
    its ratio to it. Raises `ConfigError`, which names the file or key, and the closest key.
    """
    values = deepcopy(dict(base))
    # By keys of values: a change may be a whole table.
    changed = {key: value for change in changes for key, value in flatten(dict([change]))}
    _drop_foreign_options(values, changed)

    kind_before = procedure_kind(values)
    kind = changed.get("procedure.kind", kind_before)
    if kind == "few_shot":
        _drop_loop_settings(values)
    elif kind_before == "few_shot" and kind != "fine_tune":
        _add_loop_settings(values)

    preprocess_before = deepcopy(values.get("preprocess"))
    add_fine_tune_settings(values, kind)
    for key, value in changes:
        set_value(values, key, value)

    _scale_resize(values, preprocess_before, dict(changes))
    return validate_recipe(values, source)


def _scale_resize(values: FieldValues, before: Any, changed: Collection[str]) -> None:
    """Scale `resize` with `crop`, if `crop` alone is *changed*.

    *before* is the table `preprocess` before the changes, which must have both values.
    """
    has_crop_alone = "preprocess.crop" in changed and "preprocess.resize" not in changed
    table: Any = values.get("preprocess")
    if not has_crop_alone or not isinstance(before, dict) or not isinstance(table, dict):
        return
    sides: list[Any] = [table.get("crop"), before.get("resize"), before.get("crop")]
    # The new crop, and both sides before; one of another type is left to the validation.
    if all(isinstance(side, int) and side > 0 for side in sides):
        table["resize"] = Preprocess.scaled_resize(*sides)


def _drop_foreign_options(values: FieldValues, changed: Mapping[str, Any]) -> None:
    """Drop the options that the network, data source or procedure selected by *changed* does not have."""
    for name, selector in (("model", "name"), ("data", "kind"), ("procedure", "kind")):
        table = values.get(name)
        chosen = changed.get(f"{name}.{selector}")
        if not isinstance(table, dict) or not isinstance(chosen, str):
            # There are no values or no choice; the validation of the recipe finds those of a
            # wrong type.
            continue

        if chosen == table.get(selector):
            continue

        config: type[StrictModel] | None
        if name == "model":
            config = entry(chosen).config
            options = table.get("config")
        else:
            config = _find_config(name, chosen)
            options = table

        # Without a config, the kind is unknown; the validation names it.
        if isinstance(options, dict) and config is not None:
            for key in options.keys() - config.model_fields.keys():
                del options[key]


def _drop_loop_settings(values: FieldValues) -> None:
    """Drop from *values* what `LoopRecipe` has and `FewShotRecipe` does not have.

    Recipes for both have such values, and all records of 0.3 and before.
    """
    tables = (
        (values, LoopRecipe, FewShotRecipe),
        (values.get("start"), StartConfig, StartWeights),
        (values.get("model"), ModelConfig, CatalogModel),
    )
    for table, config, kept in tables:
        if isinstance(table, dict):
            for key in config.model_fields.keys() - kept.model_fields.keys():
                table.pop(key, None)


def _add_loop_settings(values: FieldValues) -> None:
    """Add to *values*, of the few-shot procedure, the settings of a loop from the recipe `photos`."""
    photos = read_values("photos")
    start = photos.pop("start")
    if isinstance(values.get("start"), dict):
        values["start"] = {**start, **values["start"]}
    for key, value in photos.items():
        values.setdefault(key, value)


def _find_config(table: str, kind: str) -> type[StrictModel] | None:
    """Find the options of the data source or procedure *kind*; *table* is "data" or "procedure"."""
    for config in get_args(OwnDataConfig if table == "data" else ProcedureConfig):
        if kind in get_args(config.model_fields["kind"].annotation):
            return config
    return DATA_SOURCES.find(kind) if table == "data" else None  # plug-ins add no procedures


def recipe_file(values: Mapping[str, Any]) -> str:
    """Write the *values* of a whole recipe as the text of a file that `--recipe` reads; None is left out."""
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    scalars = {key: value for key, value in values.items() if key not in tables}
    lines = [
        f"{key} = {format_toml(value)}" for key, value in scalars.items() if value is not None
    ]
    for name, table in tables.items():
        entries = ((key, value) for key, value in table.items() if value is not None)
        lines += ["", f"[{name}]", *(f"{key} = {format_toml(value)}" for key, value in entries)]
    return "\n".join(lines) + "\n"


def format_toml(value: Any) -> str:
    """Format *value* as an inline TOML value; entries that are None are left out."""
    if isinstance(value, Mapping):
        pairs = (
            f"{key}={format_toml(entry)}" for key, entry in value.items() if entry is not None
        )
        return "{" + ", ".join(pairs) + "}"

    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(format_toml, value)) + "]"
    return json.dumps(value, default=str, ensure_ascii=False)


def validate_recipe(values: FieldValues, source: str) -> Recipe:
    """Validate *values* for their procedure; raise `ConfigError` with *source* and the first problem."""
    is_few_shot = procedure_kind(values) == "few_shot"
    try:
        return (FewShotRecipe if is_few_shot else LoopRecipe).model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error, values)}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def check_same_recipe(recipe: Recipe, recorded: Recipe, source: Path) -> None:
    """Raise `ConfigError` if *recipe* and that in *source* differ in more than `CHANGEABLE_KEYS`."""
    before = dict(flatten(recorded.model_dump(mode="json")))
    now = dict(flatten(recipe.model_dump(mode="json")))

    for key in sorted((before.keys() | now.keys()) - CHANGEABLE_KEYS):
        if now.get(key) == before.get(key):
            continue
        advice = "resume with the same recipe or start a new run in another folder"
        if key == "epochs":  # the learning rate of each step depends on their number
            advice = "resume with the same number, or start a new run from the best epoch"
        raise ConfigError(
            f"{source}: the run started with {key} = {before.get(key)}, now it "
            f"is {now.get(key)}; {advice}",
            remedies={"weights": source.with_name(BEST)} if key == "epochs" else None,
        )


def _explain(error: pydantic.ValidationError, values: Any) -> str:
    """Describe the first problem on one line; suggest a key for one that is unknown."""
    described = first_problem(error, values)
    if error.errors()[0]["type"] != "extra_forbidden":
        return described

    key = described.partition(": ")[0]
    keys = recipe_keys()
    if procedure_kind(values) == "few_shot" and key in _list_keys(LoopSettings):
        return (
            f"{described}; the procedure few_shot does not use it, but procedure.kind=loop does"
        )
    if key in keys:
        return f"{described}; it is a key of another kind"  # such as `optimizer.nesterov` of the kind adamw
    return with_hint(described, did_you_mean(key, keys))


def recipe_keys() -> list[str]:
    """List the dotted keys of recipes: those of all kinds of optimizers, data sources and others."""
    return sorted(set(_list_keys(LoopRecipe)))


def _list_keys(config: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of *config* and of the tables in it, of every kind."""
    for name, field in config.model_fields.items():
        yield prefix + name
        for table in _tables(field):
            yield from _list_keys(table, f"{prefix}{name}.")


def _tables(field: FieldInfo) -> list[type[pydantic.BaseModel]]:
    """List the kinds of tables that *field* may have; a plain value has none."""
    types = (field.annotation, *get_args(field.annotation))
    return [
        kind
        for kind in types
        if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)
    ]


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested tables, such as those of a recipe, with dotted keys behind *prefix*.

    An empty table is a value if the recipe may omit it.
    """
    for key, value in table.items():
        # Only a table of the recipe itself can be optional, not one in a table.
        field = None if prefix else LoopRecipe.model_fields.get(key)
        is_optional = field is not None and field.default is None
        # An empty table, such as `ema`, is a value as None is: it selects the defaults.
        is_value = is_optional and not value

        if isinstance(value, Mapping) and not is_value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
