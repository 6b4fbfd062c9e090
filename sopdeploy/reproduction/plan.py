"""The plan of a reproduction: for every row its recipe, its counts and its estimated time."""

import shlex
from pathlib import Path

import pydantic
import torch

from sopdeploy.config import StrictModel
from sopdeploy.data.augment import PadCrop
from sopdeploy.data.datasets.official import detect_kind
from sopdeploy.errors import ConfigError
from sopdeploy.files import expand_user
from sopdeploy.models.describe import describe
from sopdeploy.models.registry import CatalogModel, create_model
from sopdeploy.reproduction.facts import count_facts
from sopdeploy.reproduction.options import ReproduceOptions
from sopdeploy.reproduction.small import SMALL_DATA, small_data, small_overrides
from sopdeploy.reproduction.tables import DATA_SETS, DataSet, PrintedRow, PrintedTable
from sopdeploy.training.recipe import Recipe, parse_override, read_recipe, to_toml

# Operations of a training step per multiply-add of its forward pass: the backward pass costs twice as much as
# the forward pass, and a multiply-add is two operations.
STEP_COST = 3 * 2
GPU_OPERATIONS = 20e12  # per second that one GPU sustains
ASSUMPTION = (
    "estimate: a step costs three forward passes, and a GPU sustains 20e12 operations per second; reading "
    "images and evaluation are not counted"
)
NOT_TRAINED = {"counts": "counted, not trained", "times": "timed, not trained"}  # by what a table measures
QUANTITIES = {  # of `published.toml`, by key of a row
    "params": "parameters",
    "gflops": "operations",
    "train_params": "parameters",
    "train_gflops": "operations",
}


class Counts(StrictModel):
    """Counts of the network of a row, as `describe` computes them.

    The keys are those of `PrintedRow`. Where a paper counts differently, as `published.toml` records, the
    values follow its convention. `dim` is the length of the classified vector. `facts` are the counted values
    of `PrintedRow.facts`.
    """

    params: float
    gflops: float
    train_params: float
    train_gflops: float
    dim: int
    facts: dict[str, float] = pydantic.Field(default_factory=dict)


class Job(StrictModel):
    """A row and the recipe that trains it; if the row is not trained, `recipe` is None and `reason` says why.

    `overrides` are the changes to the recipe `source`, without seed and start weights. `gpu_hours` is the
    estimated time of one run.
    """

    row: PrintedRow
    source: str = ""
    overrides: tuple[str, ...] = ()
    recipe: Recipe | None = None
    reason: str = ""
    counts: Counts | None = None
    gpu_hours: float = 0.0

    def overrides_of(self, folder: Path, seed: int) -> tuple[str, ...]:
        """Return `overrides` with *seed* and the checkpoints of other rows; *folder* holds all runs."""
        needed = (f"{key}={run_path(folder, row, seed) / 'best.pt'}" for key, row in self.row.needs.items())
        return (*self.overrides, *needed, f"seed={seed}")

    def command(self, folder: Path, seed: int) -> str:
        """Format the command that trains the row alone."""
        settings = (word for override in self.overrides_of(folder, seed) for word in ("--set", override))
        out = str(run_path(folder, self.row.id, seed))
        return shlex.join(["sopdeploy", "train", "--recipe", self.source, *settings, "--out", out])


def run_path(folder: Path, row: str, seed: int) -> Path:
    """Return the folder of the run of *row* with *seed*."""
    return folder / row / f"seed-{seed}"


def plan_rows(table: PrintedTable, options: ReproduceOptions) -> tuple[Job, ...]:
    """Plan the selected rows of *table*; raise `ConfigError` for unknown rows."""
    return tuple(_plan_row(table, row, options) for row in table.select(options.rows))


def _plan_row(table: PrintedTable, row: PrintedRow, options: ReproduceOptions) -> Job:
    if row.layer is not None:
        return Job(row=row, reason=NOT_TRAINED["times"])
    trained = table.recipe_of(row)
    if trained is None:
        return Job(row=row, reason="cited: no network of the catalog")
    source, overrides = trained
    try:
        full = read_recipe(source, overrides)
        counts = _count(table, row, full)
        if table.measures == "counts":
            return Job(row=row, source=source, reason=NOT_TRAINED["counts"], counts=counts)
        if options.scale == "small":
            overrides = (*overrides, *_small_changes(table, row, source, overrides, options))
        elif options.data is not None:
            kind = detect_kind(expand_user(options.data)) if full.data.kind == "folder" else None
            layout = () if kind is None else (f"data.kind={kind}",)
            overrides = (*overrides, *layout, f"data.path={to_toml(str(options.data))}")
        overrides = (*overrides, *options.set)
        recipe = read_recipe(source, overrides)
    except ConfigError as error:
        return Job(row=row, source=source, overrides=overrides, reason=f"not available: {error}")
    return Job(
        row=row,
        source=source,
        overrides=overrides,
        recipe=recipe,
        counts=counts,
        gpu_hours=estimate_hours(recipe, DATA_SETS[table.data] if options.scale == "paper" else SMALL_DATA),
    )


def _small_changes(
    table: PrintedTable, row: PrintedRow, source: str, overrides: tuple[str, ...], options: ReproduceOptions
) -> list[str]:
    """Build the changes that reduce a row to the small scale; those of the table win, except for networks."""
    own = [*table.small, *row.small]
    recipe = read_recipe(source, [*overrides, *own])
    kept = {parse_override(override)[0] for override in own}
    return own + [
        override
        for override in small_overrides(recipe, small_data(options.out, options.data))
        if override.startswith(("model.", "teacher.")) or parse_override(override)[0] not in kept
    ]


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
    return macs * STEP_COST * images / GPU_OPERATIONS / 3600


def _count(table: PrintedTable, row: PrintedRow, recipe: Recipe) -> Counts:
    """Count parameters, operations and facts of the network that *recipe* trains."""
    model, side, classes = recipe.model, recipe.preprocess.crop, DATA_SETS[table.data].classes
    described = describe(model.name, image_size=side, num_classes=classes, **model.config)
    counts = {
        "params": described.shipped.parameters / 1e6,
        "gflops": described.shipped.macs / 1e9,
        "train_params": described.training.parameters / 1e6,
        "train_gflops": described.training.macs / 1e9,
    }
    for figure in reversed(described.published):  # the first figure decides
        for key, quantity in QUANTITIES.items():
            if figure.quantity.endswith(quantity) and figure.printed == getattr(row, key):
                counts[key] = figure.ours
    facts: dict[str, float] = {}
    if row.facts:
        with torch.device("meta"):
            network = create_model(model.name, num_classes=classes, **model.config)
        facts = count_facts(network, side, row.facts)
    return Counts(**counts, dim=described.representation, facts=facts)
