"""The counts that papers print for the networks of a table, beside those of the package."""

from typing import NamedTuple

from sopdeploy.models.describe import Description, Published, describe
from sopdeploy.reproduction.tables import DATA_SETS, Column, PrintedRow, PrintedTable
from sopdeploy.training.recipe import Recipe, read_recipe

# The counts of a network by column of a table: name, and quantity of `describe`'s published figures.
COUNTS: dict[Column, tuple[str, str]] = {
    "params": ("parameters (M)", "shipped parameters"),
    "train_params": ("parameters in training (M)", "training parameters"),
    "gflops": ("GFLOPs", "shipped operations"),
    "train_gflops": ("GFLOPs in training", "training operations"),
    "dim": ("classified vector", "representation"),
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
        decimals = len(f"{self.printed:.10f}".rstrip("0").partition(".")[2]) or 1  # 25 stands for 25.0
        step, excess = 10**-decimals, self.found - self.printed
        is_rounded = abs(excess) <= step / 2 * (1 + 1e-9)  # 1e-9 covers the rounding of floats
        is_cut_off = 0 <= excess < step
        return self._replace(mark="" if is_rounded or is_cut_off else "✗")


def count_figures(printed: PrintedRow, recipe: Recipe, table: PrintedTable) -> dict[str, RowFigure]:
    """Return the printed figures of a row, whose network *recipe* trains, with counts where one is known."""
    counts = _count_network(printed, recipe, table)
    facts = {"epochs": recipe.epochs, **_extra_costs(printed, table, counts)}
    figures = {name: figure for name, figure in counts.items() if figure.printed is not None}
    figures |= {name: RowFigure(value, facts.get(name)) for name, value in printed.facts.items()}
    vector, _ = COUNTS["dim"]  # not compared: it is printed in thousands
    return {name: figure if name == vector else figure.compare() for name, figure in figures.items()}


def _count_network(printed: PrintedRow, recipe: Recipe, table: PrintedTable) -> dict[str, RowFigure]:
    """Count the network that *recipe* trains, by name, each beside the figure that *table* prints.

    If *table* prints a column that the row itself lacks, both numbers are those of `published.toml`: the
    figure that the paper prints for this network, here or in another table, and its count by its convention.
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
        known = _find_published(described, column, table) if wanted else None
        if known is not None:
            factor = 1000 if column == "dim" else 1  # `published.toml` has thousands
            unit = "x" if known.unit == "x" else ""
            figures[name] = RowFigure(known.printed * factor, known.ours * factor, known.note, unit)
    return figures


def _find_published(described: Description, column: Column, table: PrintedTable) -> Published | None:
    """Find the figure that the paper prints for this network, in *table* or else in another table."""
    _, quantity = COUNTS[column]
    quantities = {quantity}
    if described.training == described.shipped:
        quantities.add(quantity.replace("training", "shipped"))  # papers print one figure for both
    figures = sorted(described.published, key=lambda figure: figure.source != table.source)  # *table* first
    paper, _, _ = table.source.partition(",")
    of_paper = (figure for figure in figures if figure.source.startswith(paper))
    return next((figure for figure in of_paper if figure.quantity in quantities), None)


def _extra_costs(printed: PrintedRow, table: PrintedTable, counts: dict[str, RowFigure]) -> dict[str, float]:
    """Subtract the counts of the row's baseline from its own *counts*, by fact; empty without a baseline."""
    baseline = next((row for row in table.rows if row.id == printed.baseline), None)
    trained = None if baseline is None else table.recipe_of(baseline)
    if baseline is None or trained is None:
        return {}
    reference = _count_network(baseline, read_recipe(*trained), table)
    costs = ("GFLOPs", "parameters (M)")
    return {f"extra {name}": (counts[name].found or 0) - (reference[name].found or 0) for name in costs}
