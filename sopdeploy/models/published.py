"""What papers print for networks of the catalog, beside what is counted here."""

from typing import Literal

from sopdeploy.frozen import Frozen
from sopdeploy.models import printed_backbones, printed_dsop, printed_gmsop, printed_gsop
from sopdeploy.models.catalog import entry, make_config
from sopdeploy.models.counting import Tally
from sopdeploy.models.printed_row import RESNET50_OPS, RESNET50_PARAMS, Row

ROWS: tuple[Row, ...] = (
    *printed_dsop.ROWS,
    *printed_gsop.ROWS,
    *printed_gmsop.ROWS,
    *printed_backbones.ROWS,
)
PER_NORM_OUTPUT, PER_ROOT_PRODUCT = 5, 42
Unit = Literal["M", "G", "K", "x"]
WORDS = {"M": "million", "G": "billion", "K": "thousand", "x": "times ResNet-50"}


class Published(Frozen):
    """One printed figure, in its unit, and ours beside it.

    `quantity` is such as "training parameters" or "representation". `reached` is false for a misprint.
    """

    source: str
    quantity: str
    unit: Unit
    printed: float
    ours: float
    reached: bool = True
    note: str = ""

    def sentence(self) -> str:
        """Return the figure in one line."""
        note = f" ({self.note})" if self.note else ""
        return (
            f"{self.source}: {self.quantity} {self.printed} {self.unit}, here {self.ours} {self.unit}{note}"
        )


def published(
    name: str, config: Frozen, num_classes: int, training: Tally, shipped: Tally, representation: int
) -> tuple[Published, ...]:
    """Return what papers print for exactly this network at its catalog's image size, and ours beside it."""
    found: list[Published] = []
    for row in ROWS:
        if row.model != name or (row.num_classes or entry(name).num_classes) != num_classes:
            continue
        if make_config(name, row.config) == config:
            found += figures(row, training if row.part == "training" else shipped, representation)
    return tuple(found)


def figures(row: Row, tally: Tally, representation: int) -> list[Published]:
    """Return every figure that *row* prints."""
    parameters = sum(n for name, n in tally.parameters.items() if name.startswith(row.module))
    per_param, per_op = (RESNET50_PARAMS, RESNET50_OPS) if row.times_resnet50 else (1e6, 1e9)
    param_unit, op_unit = ("x", "x") if row.times_resnet50 else ("M", "G")
    printed: tuple[tuple[str, str, float | None, float], ...] = (
        (f"{row.part} parameters", param_unit, row.params, parameters / per_param),
        (f"{row.part} operations", op_unit, row.ops, operations(row, tally) / per_op),
        ("representation", "K", row.dim, representation / 1e3),
    )
    return [
        Published.model_validate(
            {
                "source": row.source,
                "quantity": quantity,
                "unit": unit,
                "printed": figure,
                "ours": round(ours, 4),
                "reached": row.reached,
                "note": "; ".join(filter(None, (row.note, "cut off, not rounded" if row.cut else ""))),
            }
        )
        for quantity, unit, figure, ours in printed
        if figure is not None
    ]


def operations(row: Row, tally: Tally) -> int:
    """Return the operations of one image as the row's paper counts them."""
    macs = sum(n for name, n in tally.macs.items() if name.startswith(row.module)) + row.extra_ops
    if not row.dsop_ops:
        return macs
    return macs + PER_NORM_OUTPUT * tally.norm_outputs + PER_ROOT_PRODUCT * tally.root_products
