"""A recipe: one complete training run, read from a commented TOML file, by name or by path.

`--set optimizer.lr=0.05` changes single values; a key that does not exist is answered with the nearest
one that does.
"""

import difflib
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic

from sopdeploy.config import FractionBelowOne, NonNegative, StrictModel, first_problem
from sopdeploy.data.augment import Augmentation
from sopdeploy.data.rand_augment import Mixup, RandAugment
from sopdeploy.data.sources import DataConfig
from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import make_config
from sopdeploy.training.ema import EmaChoice
from sopdeploy.training.fine_tuning import StartChoice, TeacherChoice
from sopdeploy.training.optimizers import OptimizerChoice
from sopdeploy.training.schedule import Schedule

Count = Annotated[int, pydantic.Field(ge=0)]


class ModelChoice(StrictModel):
    """A name of the catalog and the switches of its config that differ from the catalog's defaults.

    `remove_branches_at` is an ablation: from that epoch on (counted from 0) the network learns without its
    branches; `None` keeps them to the end.
    """

    name: str
    config: dict[str, Any] = pydantic.Field(default_factory=dict)
    remove_branches_at: Annotated[int, pydantic.Field(ge=1)] | None = None

    @pydantic.model_validator(mode="after")
    def _in_the_catalog(self) -> "ModelChoice":
        config = make_config(self.name, self.config)
        if self.remove_branches_at is not None and "aux_blocks" not in type(config).model_fields:
            raise ValueError(f"remove_branches_at: {self.name} has no branches")
        return self

    def full_config(self) -> dict[str, Any]:
        """Return every switch, as a checkpoint records it."""
        return make_config(self.name, self.config).model_dump(mode="json")


class LossConfig(StrictModel):
    """Switches of the loss that are not the model's own."""

    label_smoothing: FractionBelowOne = 0.0


class SaveChoice(StrictModel):
    """When `last.pt` is written beside the end of each epoch; 0 is never.

    Each `keep_every` epochs the checkpoint is kept as `epoch-0010.pt`.
    """

    every_steps: Count = 0
    every_minutes: NonNegative = 15.0
    keep_every: Count = 0


class Recipe(StrictModel):
    """A complete run. `threads` 0 leaves the number to torch; `workers` is the most loader processes.

    `batch_size` is the samples of a step, whatever computes them; `accumulate` computes them in so many
    pieces. `batch_norm` takes its statistics from what one process computes of a piece ("local"), from the
    whole piece ("global"), or keeps the running ones ("frozen"). `sampler` "balanced" draws each class
    equally often. The defaults of what a recipe leaves out are those of the papers.
    """

    summary: str
    seed: Count = 0
    epochs: Annotated[int, pydantic.Field(ge=1)]
    batch_size: Annotated[int, pydantic.Field(ge=2)]
    accumulate: Annotated[int, pydantic.Field(ge=1)] = 1
    workers: Count = 0
    threads: Count = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    batch_norm: Literal["local", "global", "frozen"] = "local"
    sampler: Literal["shuffled", "balanced"] = "shuffled"
    model: ModelChoice
    data: DataConfig
    preprocess: Preprocess
    augment: Augmentation
    distort: RandAugment = RandAugment()
    mix: Mixup = Mixup()
    optimizer: OptimizerChoice
    schedule: Schedule
    loss: LossConfig = LossConfig()
    ema: EmaChoice | None = None
    start: StartChoice | None = None
    teacher: TeacherChoice | None = None
    save: SaveChoice = SaveChoice()

    @pydantic.model_validator(mode="after")
    def _parts_fit(self) -> "Recipe":
        if self.optimizer.kind == "adahessian" and (self.compile or self.precision == "fp16"):
            raise ValueError("optimizer.kind adahessian: needs compile=false and precision fp32 or bf16")
        if 2 * self.accumulate > self.batch_size:
            raise ValueError("accumulate: a piece of a batch needs two samples, batch_size has too few")
        removal = self.model.remove_branches_at
        if removal is not None and removal >= self.epochs:
            raise ValueError(f"model.remove_branches_at: the run has {self.epochs} epochs only")
        return self


def list_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(
        file.name.removesuffix(".toml")
        for file in resources.files("sopdeploy.recipes").iterdir()
        if file.name.endswith(".toml")
    )


def recipe_text(source: str | Path) -> str:
    """Return the TOML text of a recipe: of the package by name, or of a file that ends in `.toml`."""
    if str(source).endswith(".toml"):
        try:
            return Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            why = problem.strerror if isinstance(problem, OSError) else problem
            raise ConfigError(f"{source}: cannot be read ({why}); give a recipe file") from problem
    names = list_recipes()
    if str(source) not in names:
        near = difflib.get_close_matches(str(source), names, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(names)}"
        raise ConfigError(f"recipe {str(source)!r}: no such recipe; {hint} (a file must end in .toml)")
    return (resources.files("sopdeploy.recipes") / f"{source}.toml").read_text(encoding="utf-8")


def read_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe *source* (a packaged name or a `.toml` file) with *overrides* laid over it.

    An override is `key=value` with a dotted key and a TOML value; quotes around text may be left out.
    Raises `ConfigError` naming the file or key, and the nearest key that exists.
    """
    try:
        values = tomllib.loads(recipe_text(source))
    except tomllib.TOMLDecodeError as problem:
        raise ConfigError(f"{source}: not a TOML file ({problem})") from problem
    for override in overrides:
        lay_over(values, override)
    return validate(values, str(source))


def validate(values: dict[str, Any], where: str) -> Recipe:
    """Return *values* as a recipe; raises `ConfigError` with *where* and the first problem."""
    try:
        return Recipe.model_validate(values)
    except pydantic.ValidationError as problem:
        raise ConfigError(f"{where}: {explain(problem, values)}") from problem
    except ConfigError as problem:
        raise ConfigError(f"{where}: {problem}") from problem


def lay_over(values: dict[str, Any], override: str) -> None:
    """Set one `key=value` in *values*."""
    key, value = parse_override(override)
    *tables, last = key.split(".")
    for name in tables:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {name} is a value, not a table with keys")
    values[last] = value


def parse_override(override: str) -> tuple[str, Any]:
    """Return the dotted key and the value of `key=value`; raises `ConfigError` where it is none."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {override}: write key=value, such as optimizer.lr=0.05")
    return key, toml_value(text.strip())


def toml_value(text: str) -> Any:
    """Return *text* as TOML reads it, or as it is where it is no TOML value."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def explain(error: pydantic.ValidationError, values: dict[str, Any]) -> str:
    """Say the first thing wrong on one line, without the tags that pydantic puts into unions' places."""
    problem: Any = error.errors(include_url=False)[0]
    if not problem["loc"]:  # two values that do not fit each other; the message names them
        return str(problem["msg"]).removeprefix("Value error, ")
    written = dotted(problem["loc"], values)
    if problem["type"] == "union_tag_not_found":
        return f"{written}.kind: missing"
    if problem["type"] == "union_tag_invalid":
        return f"{written}.kind: {problem['ctx']['tag']!r} is none of {problem['ctx']['expected_tags']}"
    if problem["type"] != "extra_forbidden":
        reason = first_problem(error).removeprefix(".".join(map(str, problem["loc"])))
        return f"{written}{reason}"
    near = difflib.get_close_matches(written, sorted(set(keys_of(Recipe))), n=1)
    return f"{written}: unknown key" + (f"; did you mean {near[0]}?" if near else "")


def dotted(place: Sequence[str | int], values: Any) -> str:
    """Return *place* with dots, leaving out what is not a key on the way there."""
    *way, last = place
    parts = []
    for step in way:
        if isinstance(values, dict) and step in values:
            values = values[step]
            parts.append(str(step))
    return ".".join([*parts, str(last)])


def keys_of(config: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of *config* and of the tables in it."""
    for name, field in config.model_fields.items():
        yield prefix + name
        for table in (field.annotation, *get_args(field.annotation)):
            if isinstance(table, type) and issubclass(table, pydantic.BaseModel):
                yield from keys_of(table, f"{prefix}{name}.")
