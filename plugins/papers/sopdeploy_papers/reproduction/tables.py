"""The tables of the papers as data: printed figures, and the recipe that trains each row; options of a run.

`tables/*.toml` hold one entry per printed table or figure. `[named]` has values that several
tables share, also those of other files; "@NAME" stands for the value NAME. "@released" are the
changes to the form of GSoP's released code, "@released-keys" their keys. A list as `note` is
joined to one text. The counts that papers print for networks are in
`sopdeploy/models/published.toml`.
"""

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic

from sopdeploy.base.config import Options, Positive, StrictModel, matching
from sopdeploy.base.nearest import did_you_mean
from sopdeploy.errors import ConfigError
from sopdeploy.models.registry import GSOP_RELEASED, CatalogModel, make_config

Percent = Annotated[float, pydantic.Field(ge=0, le=100)]
Column = Literal["params", "gflops", "train_params", "train_gflops", "dim"]


class DataSet(NamedTuple):
    """The numbers of training images and of classes of a data set."""

    images: int
    classes: int


DATA_SETS = {
    "imagenet": DataSet(1_281_167, 1000),
    "imagenet250": DataSet(320_000, 250),
    "imagenet64": DataSet(1_281_167, 1000),
    "places365": DataSet(1_803_460, 365),
    "cifar10": DataSet(50_000, 10),
    "cifar100": DataSet(50_000, 100),
    "birds": DataSet(5_994, 200),
    "aircraft": DataSet(6_667, 100),
    "cars": DataSet(8_144, 196),
}


class PrintedRow(StrictModel):
    """One line of a table: what is printed, and how it is trained.

    Errors (`top1`, `top5`) are percentages; `heads` has the errors of the branch of each stage.
    `counts` are the figures in the table's `columns` that `published.toml` does not have.
    `facts` are other printed figures by name: `counts.py` compares epochs and extra costs,
    `results.py` measures speed and increments, others are only shown. Extra costs and
    increments are relative to the row `baseline`. None stands for a figure that is not printed.

    `set` are changes to the table's recipe, as for `sopdeploy train --set`. `needs` maps a key
    of the recipe to the row whose `best.pt` is its value. `pretrained` is a row of another
    table, "TABLE/ROW", whose `best.pt` gives the start weights if it exists. A `cited` row was
    not trained by the paper; it can be trained unless `missing` says why no network is that of
    the row. A `teacher` is not printed, but other rows need it.

    A cited row with a `recipe` of its own and no `set` trains as in its paper; other cited rows
    are `hosted`.
    """

    id: Annotated[
        str,
        matching(r"[a-z0-9][a-z0-9.-]*", "an id of a row: small letters, digits, dots and `-`"),
    ]
    name: str
    recipe: str | None = None
    set: tuple[str, ...] = ()
    needs: dict[str, str] = pydantic.Field(default_factory=dict)
    pretrained: str | None = None
    baseline: str | None = None
    cited: bool = False
    missing: str = ""
    teacher: bool = False
    top1: Percent | None = None
    top5: Percent | None = None
    heads: dict[str, tuple[Percent, Percent]] = pydantic.Field(default_factory=dict)
    counts: dict[Column, Positive] = pydantic.Field(default_factory=dict)
    facts: dict[str, float] = pydantic.Field(default_factory=dict)
    note: str = ""

    @property
    def hosted(self) -> bool:
        """Whether the row is cited, and trains on the recipe of other rows or a changed one of its own."""
        return self.cited and not (self.recipe and not self.set)


class OtherForm(StrictModel):
    """Another form in which a paper defines the networks of a table, such as that of its text.

    `name` says which. `set` are its options, as for `sopdeploy train --set`. The options with the
    keys `default` get the defaults of the catalog, which follow the paper's text.
    """

    name: str
    set: tuple[str, ...] = ()
    default: tuple[str, ...] = ()

    def changes(self, model: CatalogModel) -> tuple[str, ...]:
        """Return the changes to a recipe that give *model* this form; none if it lacks one of the options."""
        options = make_config(model.name, {}).model_dump(mode="json")
        defaults = {f"model.config.{key}": value for key, value in options.items()}
        if not defaults.keys() >= {
            *(change.partition("=")[0] for change in self.set),
            *self.default,
        }:
            return ()

        return (*self.set, *(as_change(key, defaults[key]) for key in self.default))


class PrintedTable(StrictModel):
    """A table or figure of a paper; `source` is its name in `published.toml`, too, the paper's name first.

    `measures` is what is compared with its rows: "errors" of trained networks, "counts" of
    networks that are only built, or "nothing". `recipe` and `set` apply to all rows. `data` is
    a key of `DATA_SETS`. `seeds` is the number of runs that the paper averages. `over` and
    `curve` make the table a chart of errors over this option of the networks, with one curve
    for each value of the other one. If `accuracy` is true, `top1` and `top5` in the file are
    the printed accuracies; they are converted to errors, and shown as accuracies again.
    `columns` are the counts that the table prints: `params` and `gflops` of the exported
    network in millions and billions, `train_params` and `train_gflops` of the network in
    training, `dim`, the length of the vector that is classified. A row has them in `counts`; those
    that it lacks are in `published.toml`. `forms` are other forms of its networks; a page has the
    commands that train them.
    """

    id: str
    source: str
    title: str
    measures: Literal["errors", "counts", "nothing"] = "errors"
    data: str = ""
    recipe: str = ""
    set: tuple[str, ...] = ()
    seeds: Annotated[int, pydantic.Field(ge=1)] = 1
    over: str = ""
    curve: str = ""
    accuracy: bool = False
    columns: tuple[Column, ...] = ()
    note: str = ""
    forms: tuple[OtherForm, ...] = ()
    rows: tuple[PrintedRow, ...]

    @pydantic.field_validator("note", mode="before")
    @classmethod
    def _join_notes(cls, note: str | list[str]) -> str:
        return note if isinstance(note, str) else "; ".join(note)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _convert_accuracies(cls, values: dict[str, Any]) -> dict[str, Any]:
        if not values.get("accuracy"):
            return values

        rows = []
        for row in values["rows"]:
            errors = {key: round(100 - row[key], 2) for key in ("top1", "top5") if key in row}
            rows.append({**row, **errors})

        return {**values, "rows": rows}

    @property
    def metric(self) -> str:
        """What the paper prints, and therefore pages and commands: "accuracy" or "error"."""
        return "accuracy" if self.accuracy else "error"

    def shown(self, error: float) -> float:
        """Convert an *error* in percent to what the paper prints, with the digits of `top1` and `top5`."""
        return round(100 - error, 10) if self.accuracy else error

    def recipe_of(self, row: PrintedRow) -> tuple[str, tuple[str, ...]] | None:
        """Return the recipe of *row* and its changes; None for a row whose network is missing."""
        if row.missing:
            return None
        return row.recipe or self.recipe, (*self.set, *row.set)

    def select(self, names: str | None) -> tuple[PrintedRow, ...]:
        """Select the rows *names*, ids separated by commas, and the rows that they need.

        None selects all rows. Raises `ConfigError` for an unknown id.
        """
        if names is None:
            return self.rows

        by_id = {row.id: row for row in self.rows}
        wanted: set[str] = set()
        for name in map(str.strip, names.split(",")):
            if name not in by_id:
                message = f"no row of {self.id}; choose one of {', '.join(by_id)}"
                raise ConfigError(message, setting="rows", value=name)
            wanted |= {name, *by_id[name].needs.values()}

        return tuple(row for row in self.rows if row.id in wanted)


@cache
def load_tables() -> dict[str, PrintedTable]:
    """Read all tables, by id."""
    folder = files("sopdeploy_papers.reproduction") / "tables"
    papers = "dsop", "gsop", "gmsop", "slides"
    contents = [
        tomllib.loads((folder / f"{paper}.toml").read_text(encoding="utf-8"))
        for paper in papers
    ]

    released = [as_change(f"model.config.{key}", value) for key, value in GSOP_RELEASED.items()]
    keys = [change.partition("=")[0] for change in released]
    shared: dict[str, Any] = {"released": released, "released-keys": keys}  # values by NAME
    for content in contents:
        shared |= content.get("named", {})

    tables: dict[str, PrintedTable] = {}
    for unresolved in chain.from_iterable(content["tables"] for content in contents):
        table = _resolve_names(unresolved, shared)

        # A table with variants is read as several tables, each with the values of one variant. The
        # `top1` of a row may list a value for each variant.
        for index, variant in enumerate(table.pop("variants", [{}])):  # {}: it has none
            rows = []
            for row in table["rows"]:
                has_several = variant and isinstance(row.get("top1"), list)
                rows.append({**row, "top1": row["top1"][index]} if has_several else row)
            printed = PrintedTable.model_validate({**table, **variant, "rows": rows})
            tables[printed.id] = printed

    return tables


def as_change(key: str, value: Any) -> str:
    """Format a change to a recipe, as for `sopdeploy train --set`; None is "none"."""
    if value is None:
        value = "none"
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _resolve_names(value: Any, shared: Mapping[str, Any]) -> Any:
    """Replace each "@NAME" in *value*, at any depth, by the value NAME of *shared*.

    Within a list, a NAME that is a list stands for its elements: ["a", "@bc"] becomes ["a",
    "b", "c"].
    """
    if isinstance(value, str):
        return _resolve_names(shared[value[1:]], shared) if value.startswith("@") else value
    if isinstance(value, dict):
        return {key: _resolve_names(inner, shared) for key, inner in value.items()}
    if not isinstance(value, list):
        return value

    resolved: list[Any] = []
    for element in value:
        inner = _resolve_names(element, shared)
        names_a_list = isinstance(element, str) and isinstance(inner, list)
        resolved += inner if names_a_list else [inner]
    return resolved


def find_table(name: str) -> PrintedTable:
    """Look up a table by its id; raise `ConfigError` with the nearest ids if it is unknown."""
    tables = load_tables()
    if name not in tables:
        hint = did_you_mean(name, tables.keys(), "`sopdeploy reproduce list` shows them")
        raise ConfigError(f"table {name!r}: no such table; {hint}")
    return tables[name]


class ReproduceOptions(Options):
    """Which rows of a table are run, how often, and on which images."""

    rows: str | None = None
    """Run only these rows, ids separated by commas, and those they need."""
    seeds: Annotated[int | None, pydantic.Field(ge=1)] = None
    """Runs per row: seeds 0, 1 and so on; by default as many as in the paper."""
    data: Path | None = None
    """Images: class folders or an official layout."""
    scale: Literal["paper", "small"] = "paper"
    """Train as in the paper, or in minutes on a CPU: 64-pixel images of --data, 20 epochs."""
    set: tuple[str, ...] = ()
    """Override a value of all recipes, such as threads=4; repeatable."""
    out: Path = Path("runs/reproduce")
    """Folder of runs and pages."""
