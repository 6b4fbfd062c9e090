"""The rows of a reproduced table: the recipe of each, its counts, its estimated time, and its results."""

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sopdeploy.data.augment import PadCrop
from sopdeploy.errors import ConfigError
from sopdeploy.models.base import Classifier
from sopdeploy.models.describe import Description, Published, describe
from sopdeploy.models.dsop import DSoP
from sopdeploy.models.registry import CatalogModel, create_model
from sopdeploy.reproduction.results import MeanError, SeedResult, mean_error
from sopdeploy.reproduction.small import IMAGES, STATEMENT, small_overrides
from sopdeploy.reproduction.tables import (
    DATA_SETS,
    Column,
    DataSet,
    PrintedRow,
    PrintedTable,
    ReproduceOptions,
    find_table,
)
from sopdeploy.training.recipe import Recipe, format_toml, read_recipe

# Operations of a training step per multiply-add of its forward pass: the backward pass costs twice as much as
# the forward pass, and a multiply-add is two operations.
_STEP_COST = 3 * 2
GPU_OPERATIONS = 20e12  # per second that one GPU sustains
ASSUMPTION = (
    "estimate: a step costs three forward passes, and a GPU sustains 20e12 operations per second; reading "
    "images and evaluation are not counted"
)
# The counts of a network by column of a table: name, and quantity of `describe`'s published figures.
COUNTS: dict[Column, tuple[str, str]] = {
    "params": ("parameters (M)", "shipped parameters"),
    "train_params": ("parameters in training (M)", "training parameters"),
    "gflops": ("GFLOPs", "shipped operations"),
    "train_gflops": ("GFLOPs in training", "training operations"),
    "dim": ("classified vector", "representation"),
}
CONVOLUTION = re.compile(r"conv\d$")  # of a block, not of its shortcut or a reduction of channels
LAYERS = {  # a layer as a paper names it, and the module that computes it; for a stage, its last block
    "conv1": "conv1",
    "pool1": "maxpool",
    "conv2_x": "layer1",
    "conv3_x": "layer2",
    "conv4_x": "layer3",
    "conv5_x": "layer4",
}


class RowFigure(NamedTuple):
    """A printed figure of a row, and the one that was counted or measured; None if there is none.

    `unit` is "x" for multiples of ResNet-50's count, `note` that of `published.toml`. `mark` is a cross if
    the count is not the printed one.
    """

    printed: float | None = None
    found: float | None = None
    note: str = ""
    unit: str = ""
    mark: str = ""

    def compare(self) -> "RowFigure":
        """Mark the figure if the count is not the printed one to its last digit, rounded or cut off."""
        if self.printed is None or self.found is None:
            return self
        digits = len(f"{self.printed:.10f}".rstrip("0").partition(".")[2]) or 1
        step = 10**-digits
        rounded = abs(self.found - self.printed) <= step / 2 * (1 + 1e-9)
        return self._replace(mark="" if rounded or 0 <= self.found - self.printed < step else "✗")


@dataclass(kw_only=True)
class ReproducedRow:
    """What is printed in a row, how it is trained, and its results so far.

    `recipe` is None for a row that is not trained, and `reason` says why. `overrides` are the changes to the
    recipe `source`, without the seed and the checkpoints of other rows. `figures` are those of the table's
    columns and of `PrintedRow.facts`, by name. `gpu_hours` is the estimated time of one run at the scale of
    the paper.
    """

    printed: PrintedRow
    source: str = ""
    overrides: tuple[str, ...] = ()
    recipe: Recipe | None = None
    reason: str = ""
    figures: dict[str, RowFigure] = field(default_factory=dict)
    gpu_hours: float = 0.0
    runs: list[SeedResult] = field(default_factory=list)

    @property
    def status(self) -> str:
        """Return "measured", "not run", or the reason for which the row cannot be run."""
        return "measured" if self.runs else self.reason or "not run"

    @property
    def top1(self) -> MeanError | None:
        """The mean top-1 error in percent."""
        return mean_error(self.runs, "top1")

    @property
    def top5(self) -> MeanError | None:
        """The mean top-5 error in percent."""
        return mean_error(self.runs, "top5")

    def measure(self, values: Mapping[str, float]) -> None:
        """Set the figures *values*, which were measured."""
        for name, value in values.items():
            self.figures[name] = self.figures.get(name, RowFigure())._replace(found=value)

    def overrides_of(self, folder: Path, seed: int) -> tuple[str, ...]:
        """Return `overrides` with *seed* and the checkpoints of other rows; *folder* holds all runs."""
        needed = (
            f"{key}={run_path(folder, row, seed) / 'best.pt'}" for key, row in self.printed.needs.items()
        )
        return (*self.overrides, *needed, f"seed={seed}")

    def command(self, folder: Path, seed: int) -> str:
        """Format the command that trains the row alone."""
        settings = (word for override in self.overrides_of(folder, seed) for word in ("--set", override))
        out = str(run_path(folder, self.printed.id, seed))
        return shlex.join(["sopdeploy", "train", "--recipe", self.source, *settings, "--out", out])


@dataclass
class Reproduction:
    """A table, the options, and the selected rows with the results so far.

    `folder` is that of the runs, `page` the path of the page, `seeds` the number of runs per row. After a
    dry run there are no results.
    """

    table: PrintedTable
    options: ReproduceOptions
    rows: tuple[ReproducedRow, ...]
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.folder = self.options.folder(self.table)
        self.page = self.folder / "index.html"
        self.seeds = self.options.seeds or (self.table.seeds if self.options.scale == "paper" else 1)

    @property
    def statement(self) -> str:
        """Why the results are not the paper's: the small scale, or what the options and the data change.

        It is empty if nothing is trained, or if no difference is known.
        """
        if self.table.measures != "errors":
            return ""
        if self.options.scale == "small":
            return STATEMENT
        printed = DATA_SETS[self.table.data].images
        counts = sorted({run.train_count for row in self.rows for run in row.runs} - {printed})
        differences = [f"--set {override}" for override in self.options.set]
        differences += [f"{count:,} training images instead of {printed:,}" for count in counts]
        if self.seeds != self.table.seeds:
            differences.append(f"{self.seeds} runs per row instead of {self.table.seeds}")
        return f"Not the conditions of the paper: {'; '.join(differences)}." if differences else ""

    @property
    def paper_scale(self) -> str:
        """How many rows have run at the scale of the paper, and the time of all; empty if none is trained."""
        rows = [row for row in self.rows if row.recipe is not None]
        if not rows:
            return ""
        measured = sum(bool(row.runs) for row in rows) if self.options.scale == "paper" else 0
        hours = format_hours(sum(row.gpu_hours for row in rows))
        done = f"{measured} of {len(rows)} rows" if measured else "no"
        return f"Run at paper scale: {done}. All rows take about {hours} per seed ({ASSUMPTION})."

    @property
    def gpu_hours(self) -> float:
        """The estimated time of all runs."""
        return self.seeds * sum(row.gpu_hours for row in self.rows)

    def commands(self, row: ReproducedRow) -> list[str]:
        """Format the commands that train *row*, one for each seed."""
        return [row.command(self.folder, seed) for seed in range(self.seeds) if row.recipe is not None]

    def summary(self) -> dict[str, Any]:
        """Return the results without the epochs of the runs and their recipes, for `--json`."""
        hidden = {"recipe", "network", "history", "machine"}
        rows = [
            {
                "printed": row.printed.model_dump(mode="json"),
                "status": row.status,
                "commands": self.commands(row),
                "gpu_hours": row.gpu_hours,
                "figures": {name: figure._asdict() for name, figure in row.figures.items()},
                "network": "" if row.recipe is None else row.recipe.model.name,
                "top1": None if row.top1 is None else row.top1.model_dump(),
                "top5": None if row.top5 is None else row.top5.model_dump(),
                "runs": [run.model_dump(mode="json", exclude=hidden) for run in row.runs],
            }
            for row in self.rows
        ]
        return {
            "table": self.table.id,
            **self.table.model_dump(include={"source", "title", "measures", "note"}),
            "scale": self.options.scale,
            "statement": self.statement,
            "paper_scale": self.paper_scale,
            "seeds": self.seeds,
            "gpu_hours": self.gpu_hours,
            "data": None if self.options.data is None else str(self.options.data),
            "page": str(self.page),
            "rows": rows,
        }


def format_hours(hours: float) -> str:
    """Format GPU *hours* with two significant digits, without an exponent."""
    return f"{float(f'{hours:.2g}'):,.{0 if hours >= 10 else 1 if hours >= 1 else 3}f} GPU hours"


def run_path(folder: Path, row: str, seed: int) -> Path:
    """Return the folder of the run of *row* with *seed*."""
    return folder / row / f"seed-{seed}"


def plan(table: PrintedTable, options: ReproduceOptions, *, dry_run: bool = False) -> Reproduction:
    """Plan the selected rows of *table*; raise `ConfigError` for unknown rows."""
    if options.scale == "small" and options.data is not None:
        raise ConfigError("the small scale has its own images; omit it", setting="data")
    rows = (_plan_row(table, printed, options) for printed in table.select(options.rows))
    return Reproduction(table, options, tuple(rows), dry_run)


def _plan_row(table: PrintedTable, printed: PrintedRow, options: ReproduceOptions) -> ReproducedRow:
    figures = {name: RowFigure(printed=value) for name, value in printed.facts.items()}
    row, trained = ReproducedRow(printed=printed, figures=figures), table.recipe_of(printed)
    if table.measures == "times":
        row.reason = "timed, not trained"
    elif trained is None:
        row.reason = "cited: no network of the catalog"
    else:
        row.source, row.overrides = trained
        try:
            _plan_training(row, table, options)
        except ConfigError as error:
            row.reason = f"not available: {error}"
    return row


def _plan_training(row: ReproducedRow, table: PrintedTable, options: ReproduceOptions) -> None:
    """Set figures, recipe and times of *row*; raise `ConfigError` if its network cannot be built."""
    recipe = read_recipe(row.source, row.overrides)
    row.figures = _count_row(row.printed, recipe, table)
    if table.measures == "counts":
        row.reason = "counted, not trained"
        return
    row.overrides += (
        *_scale_overrides(row, table, options),
        *_start_weights(row.printed, options),
        *options.set,
    )
    row.recipe = read_recipe(row.source, row.overrides)
    row.gpu_hours = estimate_hours(recipe, DATA_SETS[table.data])


def _scale_overrides(row: ReproducedRow, table: PrintedTable, options: ReproduceOptions) -> list[str]:
    """Build the overrides of the recipe of *row* for the scale and the data of *options*.

    At the small scale, overrides of the table replace the general ones, except for networks.
    """
    if options.scale == "small":
        of_table = [*table.small, *row.printed.small]
        recipe = read_recipe(row.source, [*row.overrides, *of_table])
        general = small_overrides(recipe, options.out.absolute() / IMAGES)
        return of_table + general + [one for one in of_table if not one.startswith(("model.", "teacher."))]
    return [] if options.data is None else [f"data.path={format_toml(str(options.data))}"]


def _start_weights(printed: PrintedRow, options: ReproduceOptions) -> list[str]:
    """Build the override that starts a row from the weights of its `pretrained` row, if that row has run."""
    if printed.pretrained is None:
        return []
    table, row = printed.pretrained.split("/")
    path = run_path(options.folder(find_table(table)), row, 0) / "best.pt"
    return [f"start.weights={format_toml(str(path))}"] if path.is_file() else []


def estimate_hours(recipe: Recipe, data: DataSet) -> float:
    """Estimate the GPU hours of a run of *recipe* on *data*, with the assumption `ASSUMPTION`.

    A teacher that is trained jointly costs as much per multiply-add as its student; the forward pass of a
    trained teacher, whose network only its checkpoint names, is not counted.
    """
    networks: list[CatalogModel] = [recipe.model]
    if recipe.teacher is not None and recipe.teacher.model is not None:
        networks.append(recipe.teacher.model)
    side, doubled = recipe.training_crop, isinstance(recipe.augment, PadCrop) and recipe.augment.doubled
    images = data.images * recipe.epochs * (2 if doubled else 1)
    macs = sum(
        describe(network.name, image_size=side, num_classes=data.classes, **network.config).training.macs
        for network in networks
    )
    return macs * _STEP_COST * images / GPU_OPERATIONS / 3600


def _count_row(printed: PrintedRow, recipe: Recipe, table: PrintedTable) -> dict[str, RowFigure]:
    """Compare the printed figures of a row, whose network *recipe* trains, with counts where one is known."""
    counts = _count_network(printed, recipe, table)
    facts = _count_facts(printed, recipe, table, counts)
    figures = {name: figure for name, figure in counts.items() if figure.printed is not None}
    figures |= {name: RowFigure(value, facts.get(name)) for name, value in printed.facts.items()}
    vector, _ = COUNTS["dim"]  # printed in thousands
    return {name: figure if name == vector else figure.compare() for name, figure in figures.items()}


def _count_network(printed: PrintedRow, recipe: Recipe, table: PrintedTable) -> dict[str, RowFigure]:
    """Count the network that *recipe* trains, by name, each beside the figure that *table* prints.

    A figure that the row itself does not hold is the one that the paper prints for this network, here or in
    another table; it is counted by the paper's convention, as `published.toml` records.
    """
    model, side, num_classes = recipe.model, recipe.preprocess.crop, DATA_SETS[table.data].classes
    described = describe(model.name, image_size=side, num_classes=num_classes, **model.config)
    counts: dict[Column, float] = {
        "params": described.shipped.parameters / 1e6,
        "train_params": described.training.parameters / 1e6,
        "gflops": described.shipped.macs / 1e9,
        "train_gflops": described.training.macs / 1e9,
        "dim": described.representation,
    }
    figures = {}
    for column, (name, _) in COUNTS.items():
        figures[name] = RowFigure(printed.counts.get(column), counts[column])
        wanted = column in table.columns and column not in printed.counts
        found = _find_published(described, column, table) if wanted else None
        if found is not None:
            unit = 1000 if column == "dim" else 1  # printed in thousands there
            multiple = "x" if found.unit == "x" else ""
            figures[name] = RowFigure(found.printed * unit, found.ours * unit, found.note, multiple)
    return figures


def _find_published(described: Description, column: Column, table: PrintedTable) -> Published | None:
    """Find the figure that the paper prints for this network, in *table* or else in another table."""
    _, quantity = COUNTS[column]
    quantities = {quantity}
    if described.training == described.shipped:
        quantities.add(quantity.replace("training", "shipped"))
    figures = sorted(described.published, key=lambda figure: figure.source != table.source)
    paper, _, _ = table.source.partition(",")
    of_paper = (figure for figure in figures if figure.source.startswith(paper))
    return next((figure for figure in of_paper if figure.quantity in quantities), None)


def _count_facts(
    printed: PrintedRow, recipe: Recipe, table: PrintedTable, counts: Mapping[str, RowFigure]
) -> dict[str, float]:
    """Compute the quantities that the paper prints for a row, except those that only training measures.

    Those "per stage" are counted in the first stage, because all stages of these networks are equal.
    """
    model, num_classes = recipe.model, DATA_SETS[table.data].classes
    if not printed.facts:
        return {}
    with torch.device("meta"):
        network = create_model(model.name, num_classes=num_classes, **model.config)
    facts: dict[str, float] = {"epochs": recipe.epochs}
    stage = getattr(network, "layer1", None)
    if isinstance(stage, nn.Sequential):
        branches = dict(network.branches.named_children()) if isinstance(network, DSoP) else {}
        of_stage = [branch for name, branch in branches.items() if name.startswith("layer1")]
        facts |= {
            "blocks per stage": len(stage),
            "branches per stage": len(of_stage),
            "branches": len(branches),
            "convolutions per stage": _convolutions([stage]),
            "convolutions of branches per stage": _convolutions(of_stage),
        }
    if any(" after " in name for name in printed.facts):
        facts |= _map_sizes(network, recipe.preprocess.crop)
    baseline = next((other for other in table.rows if other.id == printed.baseline), None)
    of_baseline = None if baseline is None else table.recipe_of(baseline)
    if baseline is not None and of_baseline is not None:
        reference = _count_network(baseline, read_recipe(*of_baseline), table)
        for column in ("gflops", "params"):
            name, _ = COUNTS[column]
            facts[f"extra {name}"] = (counts[name].found or 0) - (reference[name].found or 0)
    return facts


def _map_sizes(network: Classifier, side: int) -> dict[str, float]:
    """Return the side in pixels and the channels of the output of each layer in `LAYERS`."""
    sizes: dict[str, float] = {}
    for name, attribute in LAYERS.items():
        module = getattr(network, attribute, None)
        if module is not None:
            last = module[-1] if isinstance(module, nn.Sequential) else module
            last.register_forward_hook(
                lambda _module, _inputs, output, name=name: sizes.update(
                    {f"side after {name}": output.shape[-1], f"channels after {name}": output.shape[1]}
                )
            )
    with torch.no_grad():
        network.eval()(torch.empty(1, 3, side, side, device="meta"))
    return sizes


def _convolutions(modules: Iterable[nn.Module]) -> int:
    return sum(
        isinstance(module, nn.Conv2d) and CONVOLUTION.search(name) is not None
        for part in modules
        for name, module in part.named_modules()
    )
