"""Recipes: complete training configurations in TOML files.

`--set optimizer.lr=0.05` overrides single values. For an unknown key the error names the closest known one.
"""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic

from sopdeploy.config import FractionBelowOne, NonNegative, StrictModel, first_problem
from sopdeploy.data.augment import Augmentation, BoxCrop, ColorJitter, Mixup, RandAugment
from sopdeploy.data.sources import DataConfig
from sopdeploy.data.subset import DataSource
from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import CatalogModel, entry, make_config
from sopdeploy.plugins import find
from sopdeploy.project import Name
from sopdeploy.training.ema import EmaConfig
from sopdeploy.training.fine_tuning import StartConfig
from sopdeploy.training.optimizers import OptimizerConfig
from sopdeploy.training.procedure import ProcedureTable
from sopdeploy.training.schedule import Schedule
from sopdeploy.training.step.teacher import TeacherConfig

Count = Annotated[int, pydantic.Field(ge=0)]
CHANGEABLE_KEYS = {  # the recipe keys that may change when a run is resumed
    "summary",
    "workers",
    "threads",
    "device",
    "data.path",
    "start.weights",
    "save.every_minutes",
    "rejection.accepts",
}
# Keys and tables that only the training loop reads, and those that only the few-shot procedure reads.
LOOP_KEYS = (
    "epochs", "batch_size", "accumulate", "precision", "compile", "batch_norm", "sampler", "augment", "color",
    "rand_augment", "mix", "optimizer", "schedule", "loss", "ema", "teacher", "save", "start.learn",
    "start.head_factor", "model.remove_branches_at",
)  # fmt: skip
FEW_SHOT_KEYS = ("few_shot",)
SELECTING_KEYS = {"few_shot", "few_shot.procedure", "few_shot.max_minutes"}  # of the loop or the procedure


class ModelConfig(CatalogModel):
    """The network to train: a model of the catalog, and the fields of its config that are not defaults.

    `remove_branches_at` is an ablation: the epoch (from 0) at which the branches are removed; None keeps
    them.
    """

    remove_branches_at: Annotated[int, pydantic.Field(ge=1)] | None = None

    @pydantic.model_validator(mode="after")
    def _check_branches(self) -> "ModelConfig":
        if self.remove_branches_at is not None and "aux_blocks" not in entry(self.name).config.model_fields:
            raise ValueError(f"remove_branches_at: {self.name} has no branches")
        return self

    def full_config(self) -> dict[str, Any]:
        """Return the complete config, with defaults, as checkpoints store it."""
        return make_config(self.name, self.config).model_dump(mode="json")


class LossConfig(StrictModel):
    """Loss settings that do not depend on the model."""

    label_smoothing: FractionBelowOne = 0.0


class SaveConfig(StrictModel):
    """Minutes after which `last.pt` is also written within an epoch; 0 for only at its end."""

    every_minutes: NonNegative = 15.0


class RejectionConfig(StrictModel):
    """The fraction of known images to accept; with 1 no image counts as unknown."""

    accepts: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.95


class Recipe(StrictModel):
    """A complete training run; defaults follow the papers.

    `project` names the bundle and the served model; `train` sets it by the data folder, or by the recipe.
    `batch_size` is the number of samples of a step, over all processes; `accumulate` splits a step into
    that many micro-batches. `batch_norm` computes statistics per process ("local"), over the whole
    micro-batch ("global"), or uses the running statistics ("frozen"). `sampler` "balanced" draws all
    classes equally often. `threads` is the number of CPU threads of torch; 0 keeps torch's default. `workers`
    is the maximum number of data loading processes. `few_shot` replaces the training loop for few images.
    """

    summary: str
    project: Name = None
    seed: Count = 0
    epochs: Annotated[int, pydantic.Field(ge=1)]
    batch_size: Annotated[int, pydantic.Field(ge=2)]
    accumulate: Annotated[int, pydantic.Field(ge=1)] = 1
    workers: Count = 0
    threads: Annotated[int, pydantic.Field(ge=0, le=1024)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    batch_norm: Literal["local", "global", "frozen"] = "local"
    sampler: Literal["shuffled", "balanced"] = "shuffled"
    model: ModelConfig
    data: DataConfig
    preprocess: Preprocess = Preprocess()
    augment: Augmentation
    color: ColorJitter = ColorJitter()
    rand_augment: RandAugment = RandAugment()
    mix: Mixup = Mixup()
    optimizer: OptimizerConfig
    schedule: Schedule
    loss: LossConfig = LossConfig()
    ema: EmaConfig | None = None
    start: StartConfig | None = None
    teacher: TeacherConfig | None = None
    few_shot: ProcedureTable = None
    save: SaveConfig = SaveConfig()
    rejection: RejectionConfig = RejectionConfig()

    def check_effect(self, given: Sequence[str], *, few_shot: bool) -> None:
        """Raise `ConfigError` if the few-shot procedure (*few_shot*) or the loop ignores a *given* key."""
        ignored = [key for key in given if key not in SELECTING_KEYS and not is_read(key, few_shot)]
        runs, other = ("few-shot procedure", "loop") if few_shot else ("training loop", "few-shot")
        reason = f"the {runs} runs; remove them, or choose the other with few_shot.procedure={other}"
        if ignored:
            raise ConfigError(f"{', '.join(ignored)}: without effect, because {reason}")

    @property
    def training_crop(self) -> int:
        """Side of the training images in pixels."""
        crop = self.augment.crop if isinstance(self.augment, BoxCrop) else None
        return self.preprocess.crop if crop is None else crop

    @property
    def frozen_backbone(self) -> bool:
        """Whether only the branches learn."""
        return self.start is not None and self.start.learn == "branches"

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> "Recipe":
        if self.optimizer.kind == "adahessian" and (self.compile or self.precision == "fp16"):
            raise ValueError("optimizer.kind adahessian: needs compile=false and precision fp32 or bf16")
        if 2 * self.accumulate > self.batch_size:
            raise ValueError("accumulate: each micro-batch needs at least two samples; lower accumulate")
        if self.accumulate > 1 and "balance_weight" in entry(self.model.name).config.model_fields:
            raise ValueError("accumulate: the balance loss of a gate needs the whole step; set accumulate=1")
        removal = self.model.remove_branches_at
        if removal is not None and removal >= self.epochs:
            raise ValueError(
                f"model.remove_branches_at: the run has only {self.epochs} epochs; give an earlier epoch"
            )
        if removal is not None and self.frozen_backbone:
            raise ValueError(
                "model.remove_branches_at: nothing would learn after it with start.learn = branches"
            )
        return self


def list_recipes() -> list[str]:
    """List the names of the packaged recipes."""
    names = [file.name for file in resources.files("sopdeploy.recipes").iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def recipe_text(source: str | Path) -> str:
    """Read the TOML text of *source*, a packaged recipe or a path ending in `.toml`."""
    if str(source).endswith(".toml"):
        try:
            return Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{source}: cannot be read ({reason}); give a recipe file") from error
    names = list_recipes()
    if str(source) not in names:
        close = difflib.get_close_matches(str(source), names, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"choose one of {', '.join(names)}"
        raise ConfigError(f"recipe {str(source)!r}: no such recipe; {hint} (a file must end in .toml)")
    return (resources.files("sopdeploy.recipes") / f"{source}.toml").read_text(encoding="utf-8")


def read_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe *source*, a packaged name or a `.toml` file.

    An override is `key=value` with a dotted key and a TOML value; quotes around strings are optional. If an
    override selects another network, the values of `model.config` that this network does not have are
    dropped; if it selects another `data.kind`, those of `data` that this kind does not have. Raises
    `ConfigError` that names the file or key, and the closest known key.
    """
    try:
        values = tomllib.loads(recipe_text(source))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not a TOML file ({error}); correct the file") from error
    parsed = [parse_override(override) for override in overrides]
    _drop_values_of_others(values, dict(parsed))
    for override, (key, value) in zip(overrides, parsed, strict=True):
        *tables, last = key.split(".")
        table = values
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{override}: {name} is a value, not a table with keys")
        table[last] = value
    return validate_recipe(values, str(source))


def _drop_values_of_others(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Drop the values that only the recipe's network or data has, if *overrides* select others."""
    tables = {name: table for name, table in values.items() if isinstance(table, dict)}
    config, network = tables.get("model", {}).get("config", {}), overrides.get("model.name")
    if isinstance(config, dict) and isinstance(network, str):
        for key in config.keys() - entry(network).config.model_fields:
            del config[key]
    data, kind = tables.get("data", {}), overrides.get("data.kind")
    if isinstance(kind, str) and kind != data.get("kind"):
        members = get_args(get_args(DataConfig)[0])  # of the annotated union
        of_kind = (item for item in members if kind in get_args(item.model_fields["kind"].annotation))
        chosen = next(of_kind, None) or find("sopdeploy.data", kind, DataSource)
        for key in data.keys() - (data if chosen is None else chosen.model_fields).keys():
            del data[key]


def is_read(key: str, few_shot: bool) -> bool:
    """Check whether the few-shot procedure (*few_shot*) or the training loop reads *key*."""
    ignored = LOOP_KEYS if few_shot else FEW_SHOT_KEYS
    return not any(key == table or key.startswith(f"{table}.") for table in ignored)


def parse_override(override: str) -> tuple[str, Any]:
    """Split `key=value` into the dotted key and the parsed TOML value.

    A value that is not TOML is a string. Raises `ConfigError` if there is no key or no equals sign.
    """
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{override}: write key=value, for example optimizer.lr=0.05")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return key, text
    return key, parsed["value"] if parsed.keys() == {"value"} else text


def to_toml(value: Any) -> str:
    """Format *value* as an inline TOML value; entries that are None are left out."""
    if isinstance(value, Mapping):
        pairs = (f"{key}={to_toml(entry)}" for key, entry in value.items() if entry is not None)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return json.dumps(value, default=str, ensure_ascii=False)


def validate_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Validate *values*; raise `ConfigError` with *source* and the first problem."""
    try:
        return Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error, values)}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def check_same_recipe(recipe: Recipe, values: dict[str, Any], source: Path) -> None:
    """Check that *recipe* differs from *values*, recorded in *source*, only in `CHANGEABLE_KEYS`.

    Raises `ConfigError` that names the first other key.
    """
    recorded = validate_recipe(values, str(source))
    before = dict(flatten(recorded.model_dump(mode="json")))
    now = dict(flatten(recipe.model_dump(mode="json")))
    for key in sorted((before.keys() | now.keys()) - CHANGEABLE_KEYS):
        if now.get(key) != before.get(key):
            raise ConfigError(
                f"{source}: the run started with {key} = {before.get(key)}, now it is {now.get(key)}; "
                "resume with the same recipe or start a new run in another folder"
            )


def _explain(error: pydantic.ValidationError, values: Any) -> str:
    """Describe the first problem on one line, without pydantic's union tags."""
    problem: Any = error.errors(include_url=False)[0]
    if not problem["loc"]:  # several values that do not fit together; the message names them
        return str(problem["msg"]).removeprefix("Value error, ")
    *parents, last = problem["loc"]
    keys = []
    for parent in parents:
        if isinstance(values, dict) and parent in values:
            values = values[parent]
            keys.append(str(parent))
    key = ".".join([*keys, str(last)])
    if problem["type"] == "union_tag_not_found":
        return f"{key}.kind: missing"
    if problem["type"] == "union_tag_invalid":
        return f"{key}.kind: {problem['ctx']['tag']!r} is none of {problem['ctx']['expected_tags']}"
    if problem["type"] != "extra_forbidden":
        return key + first_problem(error).removeprefix(".".join(map(str, problem["loc"])))
    close = difflib.get_close_matches(key, sorted(set(_list_keys(Recipe))), n=1)
    return f"{key}: unknown key" + (f"; did you mean {close[0]}?" if close else "")


def _list_keys(config: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in config.model_fields.items():
        yield prefix + name
        for table in (field.annotation, *get_args(field.annotation)):
            if isinstance(table, type) and issubclass(table, pydantic.BaseModel):
                yield from _list_keys(table, f"{prefix}{name}.")


def flatten(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested tables with dotted keys."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
