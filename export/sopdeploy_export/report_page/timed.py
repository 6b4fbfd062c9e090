"""The section about speed: the curves where they were measured, else the command that measures."""

from sopdeploy.html.markup import Html, figure, paragraph, section, table, tag
from sopdeploy.html.plot import Axis, Curve, plot
from sopdeploy_export.findings import Findings


def speed_section(found: Findings) -> Html:
    """Return the latency over batch sizes; nothing that a clock says stands here unless it was asked for."""
    if found.speed is None:
        return section(
            "Speed",
            "speed",
            paragraph(
                "Not measured, so that two exports of one checkpoint are the same bytes. ",
                "On the machine that will serve: ",
                tag("code", "sopdeploy bench BUNDLE --batch 1,8"),
                "; or export with ",
                tag("code", "--measure-speed"),
                ".",
            ),
        )
    rows = found.speed.rows
    lines = (
        Curve(name="model.onnx", points=tuple((row.batch, row.ours_ms / row.batch) for row in rows)),
        Curve(
            name="plain backbone, no rules",
            points=tuple((row.batch, row.plain_ms / row.batch) for row in rows),
        ),
    )
    numbers = table(
        "Medians of warm calls, made in turn",
        ("images", "model.onnx", "plain backbone", "ratio", "runs"),
        [
            (
                str(row.batch),
                f"{row.ours_ms:.2f} ms",
                f"{row.plain_ms:.2f} ms",
                f"{row.ratio:.2f}",
                str(row.runs),
            )
            for row in rows
        ],
        kind="figures",
    )
    facts = ", ".join(f"{key} {value}" for key, value in found.speed.machine.items())
    chart = plot(
        "latency",
        "Milliseconds per image over batch sizes",
        lines,
        Axis("images in a batch", logarithmic=True),
        Axis("milliseconds per image", low=0.0),
    )
    return section(
        "Speed",
        "speed",
        paragraph(
            f"{found.speed.runtime} on {facts}. The plain backbone is its float32 graph, "
            "converted without rules."
        ),
        figure(chart, "Lower is faster."),
        numbers,
    )
