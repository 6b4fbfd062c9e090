"""The rows of a reproduced table: the recipe of each, its counts, its estimated time, and its results."""

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sopdeploy.data.augment import PadCrop
from sopdeploy.errors import ConfigError
from sopdeploy.models.base import Classifier
from sopdeploy.models.describe import describe
from sopdeploy.models.dsop import DSoP
from sopdeploy.models.registry import CatalogModel, create_model
from sopdeploy.reproduction.results import MeanError, SeedResult, mean_error
from sopdeploy.reproduction.small import SMALL_DATA, STATEMENT, small_data, small_overrides
from sopdeploy.reproduction.tables import (
    DATA_SETS,
    DataSet,
    PrintedRow,
    PrintedTable,
    ReproduceOptions,
    find_table,
)
from sopdeploy.training.recipe import Recipe, format_toml, read_recipe
from sopdeploy.training.recipe_files import parse_override

# Operations of a training step per multiply-add of its forward pass: the backward pass costs twice as much as
# the forward pass, and a multiply-add is two operations.
_STEP_COST = 3 * 2
GPU_OPERATIONS = 20e12  # per second that one GPU sustains
ASSUMPTION = (
    "estimate: a step costs three forward passes, and a GPU sustains 20e12 operations per second; reading "
    "images and evaluation are not counted"
)
QUANTITIES = {  # of `describe`'s published figures, by column of a table
    "params": "shipped parameters",
    "gflops": "shipped operations",
    "train_params": "training parameters",
    "train_gflops": "training operations",
    "dim": "representation",
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


@dataclass(kw_only=True)
class ReproducedRow:
    """What is printed in a row, how it is trained, and its results so far.

    `recipe` is None for a row that is not trained, and `reason` says why. `overrides` are the changes to the
    recipe `source`, without the seed and the checkpoints of other rows. `figures` are the printed counts by
    column, multiples of ResNet-50's with `times`; `counts` are those of the network, and `facts` what was
    counted or measured of `PrintedRow.facts`. `notes` are those of `published.toml`, by column, and `marks`
    has a cross for every count and counted fact that is not the printed one. `gpu_hours` is the estimated
    time of one run, `paper_hours` that of one run at the scale of the paper.
    """

    printed: PrintedRow
    source: str = ""
    overrides: tuple[str, ...] = ()
    recipe: Recipe | None = None
    reason: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    times: bool = False
    counts: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    gpu_hours: float = 0.0
    paper_hours: float = 0.0
    facts: dict[str, float] = field(default_factory=dict)
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

    def overrides_of(self, folder: Path, seed: int) -> tuple[str, ...]:
        """Return `overrides` with *seed* and the checkpoints of other rows; *folder* holds all runs."""
        needed = (
            f"{key}={run_path(folder, row, seed) / 'best.pt'}" for key, row in self.printed.needs.items()
        )
        return (*self.overrides, *needed, f"seed={seed}")

    def command(self, folder: Path, seed: int) -> str:
        """Format the command that trains the row alone; empty if it is not trained."""
        if self.recipe is None:
            return ""
        settings = (word for override in self.overrides_of(folder, seed) for word in ("--set", override))
        out = str(run_path(folder, self.printed.id, seed))
        return shlex.join(["sopdeploy", "train", "--recipe", self.source, *settings, "--out", out])


@dataclass
class Reproduction:
    """A table, the options, and the selected rows with the results so far.

    `folder` is that of the runs, `page` the path of the page, `seeds` the number of runs per row.
    """

    table: PrintedTable
    options: ReproduceOptions
    rows: tuple[ReproducedRow, ...]

    def __post_init__(self) -> None:
        self.folder = self.options.folder(self.table)
        self.page = self.folder / "index.html"
        self.seeds = self.options.runs_per_row(self.table)

    @property
    def statement(self) -> str:
        """Why the results are not the paper's: the small scale, or what the options and the data change.

        It is empty if nothing is trained, or if no difference is known.
        """
        if self.table.measures != "errors":
            return ""
        if self.options.scale == "small":
            return STATEMENT
        differences = list(dict.fromkeys(self._differences()))
        return f"Not the conditions of the paper: {'; '.join(differences)}." if differences else ""

    @property
    def paper_scale(self) -> str:
        """How many rows have run at the scale of the paper, and the time of all; empty if none is trained."""
        rows = [row for row in self.rows if row.recipe is not None]
        if not rows:
            return ""
        measured = sum(bool(row.runs) for row in rows) if self.options.scale == "paper" else 0
        hours = sum(row.paper_hours for row in rows)
        done = f"{measured} of {len(rows)} rows" if measured else "no"
        return (
            f"Run at paper scale: {done}. All rows take about {format_hours(hours)} per seed ({ASSUMPTION})."
        )

    def _differences(self) -> Iterator[str]:
        """Yield what the options, and then the finished runs, change in the paper's conditions."""
        data = DATA_SETS[self.table.data]
        yield from (f"--set {override}" for override in self.options.set)
        if self.seeds != self.table.seeds:
            yield f"{self.seeds} runs per row instead of {self.table.seeds}"
        for row in self.rows:
            trained = self.table.recipe_of(row.printed)
            if not row.runs or trained is None:
                continue
            run, printed = row.runs[0], read_recipe(*trained)
            for name, used, stated in (
                ("training images", run.train_count, data.images),
                ("classes", run.num_classes, data.classes),
                ("epochs", run.recipe["epochs"], printed.epochs),
                ("images per step", run.recipe["batch_size"], printed.batch_size),
            ):
                if used != stated:
                    yield f"{used:,} {name} instead of {stated:,}"

    def summary(self) -> dict[str, Any]:
        """Return the results without the epochs of the runs and their recipes, for `--json`."""
        hidden = {"recipe", "network", "history", "machine"}
        rows = [
            {
                "printed": row.printed.model_dump(mode="json"),
                "status": row.status,
                "command": row.command(self.folder, 0),
                "figures": row.figures,
                "counted": row.counts or None,
                "facts": row.facts,
                "notes": row.notes,
                "marks": row.marks,
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


def plan(table: PrintedTable, options: ReproduceOptions) -> Reproduction:
    """Plan the selected rows of *table*; raise `ConfigError` for unknown rows."""
    rows = (_plan_row(table, printed, options) for printed in table.select(options.rows))
    return Reproduction(table, options, tuple(rows))


def _plan_row(table: PrintedTable, printed: PrintedRow, options: ReproduceOptions) -> ReproducedRow:
    row, data = ReproducedRow(printed=printed), DATA_SETS[table.data]
    if table.measures == "times":
        row.reason = "timed, not trained"
        return row
    trained = table.recipe_of(printed)
    if trained is None:
        row.reason = "cited: no network of the catalog"
        return row
    row.source, row.overrides = trained
    try:
        recipe = read_recipe(row.source, row.overrides)
        _count_network(row, recipe, table)
        row.facts = _count_facts(row, recipe, table)
        row.marks = _mark_differences(row)
        if table.measures == "counts":
            row.reason = "counted, not trained"
            return row
        row.overrides += (
            *_scale_overrides(row, table, options),
            *_start_weights(printed, options),
            *options.set,
        )
        row.recipe = read_recipe(row.source, row.overrides)
    except ConfigError as error:
        row.reason = f"not available: {error}"
        return row
    row.gpu_hours = row.paper_hours = estimate_hours(recipe, data)
    if options.scale == "small" or options.set:
        row.gpu_hours = estimate_hours(row.recipe, data if options.scale == "paper" else SMALL_DATA)
    return row


def _scale_overrides(row: ReproducedRow, table: PrintedTable, options: ReproduceOptions) -> list[str]:
    """Build the overrides of the recipe of *row* for the scale and the data of *options*.

    At the small scale, overrides of the table replace the general ones, except for networks.
    """
    if options.scale == "small":
        of_table = [*table.small, *row.printed.small]
        recipe = read_recipe(row.source, [*row.overrides, *of_table])
        replaced = {parse_override(override)[0] for override in of_table}
        return of_table + [
            override
            for override in small_overrides(recipe, small_data(options.out, options.data))
            if override.startswith(("model.", "teacher.")) or parse_override(override)[0] not in replaced
        ]
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


def _count_network(row: ReproducedRow, recipe: Recipe, table: PrintedTable) -> None:
    """Set the printed figures, counts and notes of *row*, whose network *recipe* trains.

    A figure that the row itself does not hold is the one that the paper prints for this network, here or in
    another table; it is counted by the paper's convention, as `published.toml` records.
    """
    model, side, num_classes = recipe.model, recipe.preprocess.crop, DATA_SETS[table.data].classes
    described = describe(model.name, image_size=side, num_classes=num_classes, **model.config)
    row.counts = {
        "params": described.shipped.parameters / 1e6,
        "gflops": described.shipped.macs / 1e9,
        "train_params": described.training.parameters / 1e6,
        "train_gflops": described.training.macs / 1e9,
        "dim": described.representation,
    }
    has_branches = described.training != described.shipped
    figures = sorted(described.published, key=lambda figure: figure.source != table.source)
    for column in table.columns:
        if column in row.printed.counts:
            row.figures[column] = row.printed.counts[column]
            continue
        quantity = QUANTITIES[column]
        quantities = {quantity} if has_branches else {quantity, quantity.replace("training", "shipped")}
        for figure in figures:
            if figure.quantity in quantities and figure.source.startswith(table.paper):
                unit = 1000 if column == "dim" else 1  # printed in thousands there
                row.figures[column], row.counts[column] = figure.printed * unit, figure.ours * unit
                row.notes |= {column: figure.note} if figure.note else {}
                row.times |= figure.unit == "x"
                break


def _mark_differences(row: ReproducedRow) -> dict[str, str]:
    """Mark the counts and counted facts of *row* that are not the printed ones to the last printed digit."""
    printed, counted = row.figures | row.printed.facts, row.counts | row.facts
    compared = {key: (printed[key], counted[key]) for key in counted if key in printed and key != "dim"}
    marks = {key: compare_figures(*figures) for key, figures in compared.items()}
    return {key: mark for key, mark in marks.items() if mark}


def compare_figures(printed: float, counted: float) -> str:
    """Return "✗" if *counted* is not *printed* to its last digit; empty if it is, rounded or cut off."""
    digits = len(f"{printed:.10f}".rstrip("0").partition(".")[2]) or 1
    step = 10**-digits
    reached = abs(counted - printed) <= step / 2 * (1 + 1e-9) or 0 <= counted - printed < step
    return "" if reached else "✗"


def _count_facts(row: ReproducedRow, recipe: Recipe, table: PrintedTable) -> dict[str, float]:
    """Compute the quantities that the paper prints for *row*, except those that only training measures.

    Those "per stage" are counted in the first stage, because all stages of these networks are equal.
    """
    printed, model, num_classes = row.printed, recipe.model, DATA_SETS[table.data].classes
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
    baseline_recipe = None if baseline is None else table.recipe_of(baseline)
    if baseline is not None and baseline_recipe is not None:
        reference = ReproducedRow(printed=baseline)
        _count_network(reference, read_recipe(*baseline_recipe), table)
        facts["extra GFLOPs"] = row.counts["gflops"] - reference.counts["gflops"]
        facts["extra parameters (M)"] = row.counts["params"] - reference.counts["params"]
    return {name: facts[name] for name in printed.facts if name in facts}


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
