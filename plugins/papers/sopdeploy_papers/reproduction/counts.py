"""The counts that papers print for the networks of a table, beside those of the package."""

import json
from functools import cache
from typing import Any, NamedTuple

from sopdeploy.models.describe import Description, Published, describe
from sopdeploy.models.registry import CatalogModel
from sopdeploy.training.settings.recipe import LoopRecipe, Recipe, read_recipe
from sopdeploy_papers.reproduction.tables import DATA_SETS, Column, PrintedRow, PrintedTable

# The counts of a network by column of a table: name, and quantity of `describe`'s published
# figures.
COUNTS: dict[Column, tuple[str, str]] = {
    "params": ("parameters (M)", "shipped parameters"),
    "train_params": ("parameters in training (M)", "training parameters"),
    "gflops": ("GFLOPs", "shipped operations"),
    "train_gflops": ("GFLOPs in training", "training operations"),
    "dim": ("classified vector", "representation"),
}


class RowFigure(NamedTuple):
    """A printed figure of a row, and the one that was counted or measured; None if there is none.

    `unit` is "x" for multiples of ResNet-50's count, `note` that of `published.toml`. `mark` is
    a cross if the count is not the printed one.
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
        digits = f"{self.printed:.10f}".rstrip("0").partition(".")[2]  # those after the point
        step = 10 ** -max(1, len(digits))  # of the last printed digit; 25 stands for 25.0

        excess = self.found - self.printed
        is_rounded = abs(excess) <= step / 2 * (1 + 1e-9)  # 1e-9 covers the rounding of floats
        is_cut_off = 0 <= excess < step  # needs no 1e-9: an excess near 0 counts as rounded
        return self._replace(mark="" if is_rounded or is_cut_off else "✗")


def describe_network(model: CatalogModel, *, side: int, num_classes: int) -> Description:
    """Describe *model* for images of *side* pixels; several figures of several rows need the same counts."""
    return _describe_once(
        model.name, side, num_classes, json.dumps(model.config, sort_keys=True)
    )


@cache
def _describe_once(name: str, side: int, num_classes: int, config: str) -> Description:
    options: dict[str, Any] = json.loads(config)
    return describe(name, image_size=side, num_classes=num_classes, **options)


def count_figures(
    printed: PrintedRow, recipe: LoopRecipe, table: PrintedTable
) -> dict[str, RowFigure]:
    """Return the printed figures of a row, whose network *recipe* trains, with counts where one is known."""
    figures = _count_network(printed, recipe, table)
    known = {"epochs": recipe.epochs, **_subtract_baseline(printed, table, figures)}
    figures |= {
        name: RowFigure(value, known.get(name)) for name, value in printed.facts.items()
    }

    # Not compared, because papers print its length in thousands, such as 8K
    vector, _ = COUNTS["dim"]
    compared = {}
    for name, figure in figures.items():
        if figure.printed is not None:
            compared[name] = figure if name == vector else figure.compare()
    return compared


def _count_network(
    printed: PrintedRow, recipe: Recipe, table: PrintedTable
) -> dict[str, RowFigure]:
    """Count the network that *recipe* trains; return each count, by name, beside the printed figure.

    If the row has no figure in a column of *table*, both come from `published.toml` where that
    has them: the figure that the paper prints for this network elsewhere, and our count by the
    convention of the paper.
    """
    model = recipe.model
    side = recipe.preprocess.crop
    num_classes = DATA_SETS[table.data].classes
    described = describe_network(model, side=side, num_classes=num_classes)

    # Counts in the units of the tables' columns.
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

        # Papers print some figures in another table, or as a multiple of ResNet-50's.
        lacks_figure = column in table.columns and column not in printed.counts
        if lacks_figure and (known := _find_published(described, column, table)):
            # `published.toml` has the vector's length in thousands
            scale = 1000 if column == "dim" else 1
            # others, such as "M", are those of the column
            unit = "x" if known.unit == "x" else ""
            figures[name] = RowFigure(
                known.printed * scale, known.ours * scale, known.note, unit
            )
    return figures


def _find_published(
    described: Description, column: Column, table: PrintedTable
) -> Published | None:
    """Find the figure that the paper prints for this network, in *table* or else in another of its tables."""
    _, quantity = COUNTS[column]
    quantities = {quantity}
    if described.training == described.shipped:
        # Nothing is removed after training, so papers print one figure.
        quantities.add(quantity.replace("training", "shipped"))

    paper, _, _ = table.source.partition(",")  # "DSoP" of "DSoP, Table I"
    of_paper = [
        figure
        for figure in described.published
        if figure.quantity in quantities and figure.source.startswith(paper)
    ]

    of_table = [figure for figure in of_paper if figure.source == table.source]
    return next(iter(of_table + of_paper), None)


def _subtract_baseline(
    printed: PrintedRow, table: PrintedTable, counts: dict[str, RowFigure]
) -> dict[str, float]:
    """Subtract the counts of the row's baseline from its own *counts*, by fact; empty without a baseline."""
    baseline = next((row for row in table.rows if row.id == printed.baseline), None)
    if baseline is None or (recipe_and_changes := table.recipe_of(baseline)) is None:
        return {}  # there is no baseline, or it is only cited

    reference = _count_network(baseline, read_recipe(*recipe_and_changes), table)
    costs = {}
    for name in ("GFLOPs", "parameters (M)"):
        count = counts[name].found
        reference_count = reference[name].found
        if count is not None and reference_count is not None:
            costs[f"extra {name}"] = count - reference_count
    return costs
