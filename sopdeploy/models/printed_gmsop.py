"""What the GM-SOP paper (Tables 2 and 3) and the README of its code print: parameters and vectors.

Second order as released keeps the map of conv5_x, the paper halves it; parameters are the same.
"""

from typing import Any

from sopdeploy.models.printed_row import Row


def row(model: str, params: float, dim: float | None = None, **more: Any) -> Row:
    """Return a row of Tables 2 and 3; the length of the vector is printed whole."""
    return Row(source="GM-SOP, Tables 2 and 3", model=model, params=params, dim=dim, **more)


ROWS = (
    Row(
        source="GM-SOP, README",
        model="resnet18-64px",
        params=0.9,
        reached=False,
        note="misprint: layers as printed give 0.83",
    ),
    row("resnet18-512d", 1.3, 0.512),
    row("srsop-resnet18", 9.0, 8.256),
    row("srsop-resnet18", 9.0, 8.256, config={"conv5_stride": 1}),
    row("sgmoe-16-8-resnet18", 2.3),
    row("netvlad-64-resnet18", 8.9, 8.192),
    row("gmgap-16-8-resnet18", 2.3, 0.512, part="training"),
    row("gmsop-16-8-resnet18", 10.3, 8.256, part="training", cut=True),
    row("gmsop-16-8-resnet18", 10.3, 8.256, part="training", cut=True, config={"conv5_stride": 1}),
    row("resnet50-64px", 2.4, 0.128),
    row("resnet50-512d", 2.8, 0.512),
    row("resnet50-8256d", 11.6, 8.256),
    row("gmsop-16-8-resnet50", 11.9, 8.256, part="training"),
    row("wrn36-1", 1.6, 0.128, note="without a projection in the first stage; with it 1,614,760"),
    row("wrn36-2", 6.2, 0.256),
    row("wrn36-5", 37.6, 0.64),
    row("gmgap-16-8-wrn36-2", 8.7, 0.512, part="training"),
    row(
        "gmsop-16-8-wrn36-2",
        15.7,
        part="training",
        reached=False,
        note="misprint: the released code builds 17.8",
    ),
)
