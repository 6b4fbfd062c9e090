"""The plan of a reproduced table: the recipe of each row, its commands, its estimated time, its results."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sopdeploy.base.files import BEST
from sopdeploy.data.augment import PadCrop
from sopdeploy.errors import ConfigError
from sopdeploy.models.describe import Counts
from sopdeploy.models.registry import CatalogModel, make_config
from sopdeploy.training.settings.recipe import LoopRecipe, Recipe, format_toml, read_recipe
from sopdeploy.weights.published import published_network
from sopdeploy_papers.reproduction.counts import RowFigure, count_figures, describe_network
from sopdeploy_papers.reproduction.results import SeedResult, mean_error
from sopdeploy_papers.reproduction.tables import (
    DATA_SETS,
    DataSet,
    PrintedRow,
    PrintedTable,
    ReproduceOptions,
)

# Operations of a training step per multiply-add of its forward pass: the backward pass costs
# twice as much as the forward pass, and a multiply-add is two operations.
_OPERATIONS_PER_MAC = 3 * 2
GPU_OPERATIONS_PER_SECOND = 20e12  # that one GPU sustains
SMALL_SIDE = 64
SMALL_BATCH = 32
SMALL_EPOCHS = 20
SMALL_SCALE = (
    f"the classes of --data, images of at most {SMALL_SIDE} pixels, {SMALL_EPOCHS} epochs, batches of "
    f"{SMALL_BATCH} with as much smaller a rate, one cycle, gradients up to 5, random initial weights"
)
HOSTED = "figures of other papers, trained here by the recipe of the command, not by the recipe of their paper"
ASSUMPTION = (
    "estimate: a step costs three forward passes, and a GPU sustains 20e12 operations per second; reading "
    "images and evaluation are not counted"
)


@dataclass(kw_only=True)
class ReproducedRow:
    """What is printed in a row, how it is trained, and its results so far.

    `recipe` is None for a row that is not trained, and `reason` says why. `overrides` are the
    changes to the recipe `source`, without the seed and the checkpoints of other rows.
    `figures` are those of the table's columns and of `PrintedRow.facts`, by name. `forms` has
    the counts in training of the network's other forms, by name and changes to the recipe.
    `gpu_hours` is the estimated time of one run as in the paper. `failure` says which seed
    failed, and why.
    """

    printed: PrintedRow
    source: str = ""
    overrides: tuple[str, ...] = ()
    recipe: Recipe | None = None
    reason: str = ""
    figures: dict[str, RowFigure] = field(default_factory=dict)
    forms: dict[tuple[str, tuple[str, ...]], Counts] = field(default_factory=dict)
    gpu_hours: float = 0.0
    runs: list[SeedResult] = field(default_factory=list)
    failure: str = ""

    @property
    def status(self) -> str:
        """Return "measured", "not run", the reason for which the row cannot be run, or its failure."""
        return self.failure or ("measured" if self.runs else self.reason or "not run")


@dataclass
class Reproduction:
    """A table, the options, and the selected rows with the results so far.

    `folder` is that of the runs, `page` the path of the page, `seeds` the number of runs per
    row. After a dry run there are no results.
    """

    table: PrintedTable
    options: ReproduceOptions
    rows: tuple[ReproducedRow, ...]
    dry_run: bool = False

    def __post_init__(self) -> None:
        self.folder = self.options.out / self.table.id
        self.page = self.folder / "index.html"
        self.seeds = self.options.seeds or self.table.seeds

    @property
    def deviations(self) -> str:
        """What the options and the data change in the experiment of the paper; empty if nothing is known."""
        if self.table.measures != "errors":
            return ""

        printed = DATA_SETS[self.table.data].images
        counts = sorted({run.train_count for row in self.rows for run in row.runs} - {printed})
        differences = [f"--set {override}" for override in self.options.set]
        if self.options.scale == "small":
            differences.insert(0, f"--scale small ({SMALL_SCALE})")
        differences += [f"{count:,} training images instead of {printed:,}" for count in counts]

        if self.seeds != self.table.seeds:
            differences.append(f"{self.seeds} runs per row instead of {self.table.seeds}")
        return (
            f"Not the conditions of the paper: {'; '.join(differences)}." if differences else ""
        )

    @property
    def note(self) -> str:
        """The note of the table, the rows that are `hosted`, and options and counts of the other forms."""
        counts_by_form: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for row in self.rows:
            for form, counts in row.forms.items():
                text = f"{row.printed.id} {counts.parameters:,} and {counts.macs / 1e9:.3f} G"
                counts_by_form.setdefault(form, []).append(text)

        notes = [self.table.note] if self.table.note else []
        if hosted := [
            row.printed.id for row in self.rows if row.recipe is not None and row.printed.hosted
        ]:
            notes.append(f"{HOSTED}: {', '.join(hosted)}")

        for (name, changes), texts in counts_by_form.items():
            options = shlex.join(_as_settings(changes))
            notes.append(
                f"{name}: {options} (parameters and multiply-adds in training: {', '.join(texts)})"
            )
        return "; ".join(notes)

    @property
    def paper_scale(self) -> str:
        """How many rows have run as in the paper, and the estimated time of all; empty if none can run."""
        rows = [row for row in self.rows if row.recipe is not None]
        if not rows:
            return ""

        # With deviations, no run was as in the paper.
        num_measured = 0 if self.deviations else sum(bool(row.runs) for row in rows)
        done = f"{num_measured} of {len(rows)} rows" if num_measured else "no"
        hours = format_hours(sum(row.gpu_hours for row in rows))
        return (
            f"Run at paper scale: {done}. All rows take about {hours} per seed ({ASSUMPTION})."
        )

    @property
    def gpu_hours(self) -> float:
        """The estimated time of all runs at the scale of the paper."""
        return self.seeds * sum(row.gpu_hours for row in self.rows)

    def run_folder(self, row: str, seed: int) -> Path:
        """Return the folder of the run of *row* with *seed*."""
        return self.folder / row / f"seed-{seed}"

    def overrides(self, row: ReproducedRow, seed: int) -> tuple[str, ...]:
        """Return the overrides of *row* with *seed* and the checkpoints of other rows."""
        needs = row.printed.needs.items()
        needed = (f"{key}={self.run_folder(other, seed) / BEST}" for key, other in needs)
        return (*row.overrides, *needed, f"seed={seed}")

    def commands(self, row: ReproducedRow) -> list[str]:
        """Format the commands that train *row* alone, one for each seed; none if it is not trained."""
        if row.recipe is None:
            return []

        lines = []
        for seed in range(self.seeds):
            settings = _as_settings(self.overrides(row, seed))
            out = str(self.run_folder(row.printed.id, seed))
            lines.append(
                shlex.join(
                    ["sopdeploy", "train", "--recipe", row.source, *settings, "--out", out]
                )
            )
        return lines

    def summary(self) -> dict[str, object]:
        """Return the results without the epochs of the runs and their recipes, for `--json`."""
        # Histories and recipes are long; files beside the page have them.
        hidden = {"recipe", "network", "history", "machine"}
        rows = []
        for row in self.rows:
            top1 = mean_error(row.runs, "top1")
            top5 = mean_error(row.runs, "top5")
            rows.append(
                {
                    "printed": row.printed.model_dump(mode="json"),
                    "status": row.status,
                    "commands": self.commands(row),
                    "gpu_hours": row.gpu_hours,
                    "figures": {name: figure._asdict() for name, figure in row.figures.items()},
                    "network": "" if row.recipe is None else row.recipe.model.name,
                    "top1": None if top1 is None else top1.model_dump(),
                    "top5": None if top5 is None else top5.model_dump(),
                    "runs": [run.model_dump(mode="json", exclude=hidden) for run in row.runs],
                }
            )

        return {
            "table": self.table.id,
            **self.table.model_dump(include={"source", "title", "measures"}),
            "note": self.note,
            "statement": self.deviations,
            "paper_scale": self.paper_scale,
            "seeds": self.seeds,
            "gpu_hours": self.gpu_hours,
            "data": None if self.options.data is None else str(self.options.data),
            "page": str(self.page),
            "rows": rows,
        }


def _as_settings(changes: Iterable[str]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def format_hours(hours: float) -> str:
    """Round GPU *hours* to two significant digits and at most three decimals; format without an exponent."""
    decimals = 3
    if hours >= 1:
        decimals = 0 if hours >= 10 else 1
    rounded = float(f"{hours:.2g}")
    return f"{rounded:,.{decimals}f} GPU hours"


def plan(
    table: PrintedTable, options: ReproduceOptions, *, dry_run: bool = False
) -> Reproduction:
    """Plan the selected rows of *table*; raise `ConfigError` for unknown rows, or small ones without data."""
    if options.scale == "small" and options.data is None:
        raise ConfigError("give a folder of classes as --data", setting="scale", value="small")

    rows = []
    for printed in table.select(options.rows):
        figures = {name: RowFigure(printed=value) for name, value in printed.facts.items()}
        row = ReproducedRow(printed=printed, figures=figures)

        recipe_and_changes = table.recipe_of(printed)
        if table.measures == "nothing":
            row.reason = "printed, not measured"
        elif recipe_and_changes is None:
            row.reason = f"cited: {printed.missing}"
        else:
            row.source, row.overrides = recipe_and_changes
            try:
                _plan_training(row, table, options)
            except ConfigError as error:
                row.reason = f"not available: {error}"
        rows.append(row)

    return Reproduction(table, options, tuple(rows), dry_run)


def _plan_training(row: ReproducedRow, table: PrintedTable, options: ReproduceOptions) -> None:
    """Set figures, other forms, recipe and time of *row*; a row that is only counted gets its reason.

    Raises `ConfigError` if its network cannot be built, or no start weights are published for
    it.
    """
    # Without the user's data and settings
    paper_recipe = read_recipe(row.source, row.overrides)
    if not isinstance(paper_recipe, LoopRecipe):
        raise TypeError(f"{row.source}: papers train their networks in a loop")
    row.figures = count_figures(row.printed, paper_recipe, table)

    for form in table.forms:
        if changes := form.changes(paper_recipe.model):
            other = read_recipe(row.source, (*row.overrides, *changes)).model
            if other != paper_recipe.model:
                classes = DATA_SETS[table.data].classes
                side = paper_recipe.preprocess.crop
                described = describe_network(other, side=side, num_classes=classes)
                row.forms[form.name, changes] = described.training

    if table.measures == "counts":
        row.reason = "counted, not trained"
        return

    # The user's data, at their scale or that of the paper.
    if options.scale == "small" and options.data is not None:
        row.overrides += scale_down(paper_recipe, options.data)
    elif options.data is not None:
        row.overrides += (f"data.path={format_toml(str(options.data))}",)

    if row.printed.pretrained is not None:
        # The result of another table's row
        weights = options.out / row.printed.pretrained / "seed-0/best.pt"
        if weights.is_file():  # otherwise the row starts from random weights
            row.overrides += (f"start.weights={format_toml(str(weights))}",)

    row.overrides += options.set
    recipe = read_recipe(row.source, row.overrides)
    if recipe.start is not None and recipe.start.weights == "imagenet":
        # Raises an error if no weights are published.
        published_network(
            recipe.model.name, make_config(recipe.model.name, recipe.model.config)
        )

    row.recipe = recipe
    row.gpu_hours = estimate_hours(paper_recipe, DATA_SETS[table.data])


def scale_down(recipe: LoopRecipe, data: Path) -> tuple[str, ...]:
    """Build the changes that train the network of *recipe* on the classes in *data* in minutes on a CPU."""
    side = min(SMALL_SIDE, recipe.preprocess.crop)
    batch = SMALL_BATCH
    changes = [
        f"data={format_toml({'kind': 'folder', 'path': str(data)})}",
        f"preprocess.resize={side}",
        f"preprocess.crop={side}",
        f"batch_size={batch}",
        "workers=0",
        f"optimizer.lr={recipe.optimizer.lr * batch / recipe.batch_size:g}",
        "optimizer.clip_norm=5.0",
        f"epochs={SMALL_EPOCHS}",
        'schedule={kind="one-cycle"}',
        "start.weights=none",
    ]

    if recipe.preprocess.crop > side:  # crops of larger images do not fit
        changes.append('augment={kind="random-resized-crop", flip=0.5}')
    if recipe.model.remove_branches_at is not None:
        changes.append(f"model.remove_branches_at={SMALL_EPOCHS // 2}")

    return tuple(changes)


def estimate_hours(recipe: LoopRecipe, data: DataSet) -> float:
    """Estimate the GPU hours of a run of *recipe* on *data*, with the assumption `ASSUMPTION`.

    A teacher that is trained jointly costs as much per multiply-add as its student; the forward
    pass of a trained teacher, whose network only its checkpoint names, is not counted.
    """
    networks: list[CatalogModel] = [recipe.model]
    if recipe.teacher is not None and recipe.teacher.model is not None:
        networks.append(recipe.teacher.model)

    # The images of all epochs. With `doubled`, an epoch also has the mirror image of each.
    is_doubled = isinstance(recipe.augment, PadCrop) and recipe.augment.doubled
    num_images = data.images * recipe.epochs * (2 if is_doubled else 1)
    side = recipe.training_crop

    macs = sum(
        describe_network(network, side=side, num_classes=data.classes).training.macs
        for network in networks
    )

    return macs * _OPERATIONS_PER_MAC * num_images / GPU_OPERATIONS_PER_SECOND / 3600
