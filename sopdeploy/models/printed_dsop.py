"""What DSoP's Tables I, II, VIII and X print.

The tables' branches stride (1, 2, 2, 1), the text's do not; see `models/dsop.py`.
"""

from typing import Any

from sopdeploy.models.printed_row import Row


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


SQUEEZE_AND_SCALE = 2 * (3 * 256 * 56**2 + 4 * 512 * 28**2 + 6 * 1024 * 14**2 + 3 * 2048 * 7**2)
RESNET50_NOTE = (
    "misprint: "
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
    Row(source="DSoP, Table II", model="isqrt-resnet50", params=56.9),
    Row(source="DSoP, Table II", model="mpncov-resnet50", params=56.9),
    Row(
        source="DSoP, Table II",
        model="se-resnet50",
        config={"bottleneck_stride": "v1"},
        params=28.1,
        ops=3.87,
        extra_ops=SQUEEZE_AND_SCALE,
        note="operations count the squeeze and the scaling, too",
    ),
    Row(
        source="DSoP, Table II",
        model="cbam-resnet50",
        config={"bottleneck_stride": "v1"},
        params=28.1,
        ops=3.86,
    ),
)
