"""What papers print for networks of the catalog, to stand beside what is counted here.

DSoP's GFLOPs are multiply-adds plus 5 per output of a batch norm, and while training 42 d^3 per covariance
root: the 5 is fvcore's, the 42 was fitted to ten printed rows (12 d^3 are computed; its origin is unknown).
The other papers count the multiply-adds alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sopdeploy.frozen import Frozen
from sopdeploy.models.catalog import entry, make_config
from sopdeploy.models.counting import Tally

Quantity = Literal["training parameters", "training operations", "shipped parameters", "shipped operations"]
PER_NORM_OUTPUT, PER_ROOT_PRODUCT = 5, 42


class Published(Frozen):
    """One printed figure, in millions of parameters or billions of operations, and ours beside it."""

    source: str
    quantity: Quantity
    printed: float
    ours: float
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One network of a paper's table: `params` in millions and `ops` in billions, as printed.

    `part` says of which network they are, while training or shipped; `dsop_ops` that operations are
    counted as in DSoP's tables.
    """

    source: str
    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    part: Literal["training", "shipped"] = "shipped"
    params: float
    ops: float | None = None
    dsop_ops: bool = False
    note: str = ""


def dsop_row(table: str, model: str, params: float, ops: float, note: str = "", **config: Any) -> Row:
    """Return a row of DSoP's tables of networks while they train, whose branches stride."""
    return Row(
        source=f"DSoP, Table {table}",
        model=model,
        config={"aux_stride": "table", **config},
        part="training",
        params=params,
        ops=ops,
        dsop_ops=True,
        note=note,
    )


def backbone_row(depth: int, params: float, ops: float) -> Row:
    """Return a row of DSoP's Table I of a ResNet that ships."""
    return Row(
        source="DSoP, Table I",
        model=f"resnet{depth}",
        config={"conv5_stride": 1},
        params=params,
        ops=ops,
        dsop_ops=True,
    )


def table_x(blocks: tuple[int, ...], params: float, ops: float) -> Row:
    """Return a row of DSoP's Table X, by the blocks of the four branches."""
    note = "parameters count unused branches, which keep one block and their head; operations do not"
    return dsop_row("X", "dsop-resnet18", params, ops, note, aux_blocks=blocks, keep_unused_branches=True)


RESNET50_NOTE = (
    "only 3, 4, 7, 3 blocks and four heads of 256 channels give these figures; "
    "the table's own layers are 13 blocks in a_conv4_x and 64 channels in a_pds2"
)
ROWS = (
    backbone_row(18, 11.7, 3.06),
    backbone_row(34, 21.8, 5.61),
    backbone_row(50, 25.6, 6.27),
    backbone_row(101, 44.5, 10.01),
    Row(
        source="DSoP, Table II",
        model="resnet50",
        config={"bottleneck_stride": "v1"},
        params=25.6,
        ops=3.86,
    ),
    dsop_row("I", "dsop-resnet18", 100.6, 7.26),
    dsop_row("I", "dsop-resnet34", 110.7, 9.81),
    dsop_row("I", "dsop-resnet50", 181.9, 13.45, RESNET50_NOTE),
    dsop_row("VIII", "dsop-resnet18", 32.7, 5.69, aux_widths=(64,) * 4),
    dsop_row("VIII", "dsop-resnet18", 51.3, 5.95, aux_widths=(128,) * 4),
    table_x((8, 0, 0, 0), 94.8, 4.94),
    table_x((0, 0, 0, 8), 127.4, 11.23),
    table_x((4, 4, 0, 0), 95.4, 4.34),
    table_x((4, 0, 0, 4), 108.7, 8.47),
    table_x((0, 0, 4, 4), 112.0, 8.50),
    Row(source="He et al. 2016, Table 6", model="resnet20", params=0.27),
    Row(source="He et al. 2016, Table 6", model="resnet32", params=0.46),
    Row(source="He et al. 2016, Table 6", model="resnet44", params=0.66),
    Row(source="He et al. 2016, Table 6", model="resnet56", params=0.85),
    Row(source="He et al. 2016, Table 6", model="resnet110", params=1.7),
    Row(source="GSoP, Table 6", model="preact-resnet164", num_classes=100, params=1.7, ops=0.25),
    Row(source="Zagoruyko and Komodakis 2016", model="wrn-22-10", params=26.8),
    Row(source="Zagoruyko and Komodakis 2016", model="wrn-28-10", params=36.5),
    Row(source="Xie et al. 2017", model="resnext29-8x64d", params=34.4),
    Row(source="Xie et al. 2017", model="resnext29-16x64d", params=68.1, note="cut off, not rounded"),
    Row(source="Tan and Le 2019, Table 2", model="efficientnet-b0", params=5.3, ops=0.39),
)


def published(
    name: str, config: Frozen, num_classes: int, training: Tally, shipped: Tally
) -> tuple[Published, ...]:
    """Return what papers print for exactly this network at its catalog's image size, and ours beside it."""
    found = []
    for row in ROWS:
        if row.model != name or (row.num_classes or entry(name).num_classes) != num_classes:
            continue
        if make_config(name, row.config) == config:
            found += figures(row, training if row.part == "training" else shipped)
    return tuple(found)


def figures(row: Row, tally: Tally) -> list[Published]:
    """Return the parameters of *row*, and the operations where they are printed."""
    counts = tally.total()
    pairs: list[tuple[str, float | None, float]] = [
        ("parameters", row.params, counts.parameters / 1e6),
        ("operations", row.ops, operations(row, tally) / 1e9),
    ]
    return [
        Published.model_validate(
            {
                "source": row.source,
                "quantity": f"{row.part} {what}",
                "printed": printed,
                "ours": round(ours, 4),
                "note": row.note,
            }
        )
        for what, printed, ours in pairs
        if printed is not None
    ]


def operations(row: Row, tally: Tally) -> int:
    """Return the operations of one image as the row's paper counts them."""
    macs = tally.total().macs
    if not row.dsop_ops:
        return macs
    return macs + PER_NORM_OUTPUT * tally.norm_outputs + PER_ROOT_PRODUCT * tally.root_products
