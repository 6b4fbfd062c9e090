"""The sections about what was measured: drift, the gate, second-order parts, precision."""

from sopdeploy.html.charts import Bar, bars
from sopdeploy.html.markup import Html, figure, folded, paragraph, percent, section, table
from sopdeploy_export.parity.report import ParityReport
from sopdeploy_export.precision.report import Accuracy
from sopdeploy_export.report.results import ExportResults


def drift_section(found: ExportResults) -> Html:
    """Return how far the file is from the network in float64, output by output and part by part."""
    parity = found.parity
    outputs = table(
        "Outputs of model.onnx against the network in float64",
        ("output", "largest drift", "noise floor", "in floors", "allowed"),
        [
            (
                name,
                f"{output.largest_drift:.3g}",
                f"{output.noise_floor:.3g}",
                f"{output.drift_in_floors:.2f}",
                f"{output.tolerance:.3g}",
            )
            for name, output in parity.outputs.items()
        ],
        kind="figures",
    )
    state = "within what is allowed" if parity.passed else "NOT within what is allowed; that was accepted"
    intro = paragraph(
        f"The noise floor is how far the network's own {parity.precision} run is from float64. The file may "
        f"drift {parity.floors_allowed:g} floors; it is {state}. Measured with {parity.runtime} on "
        f"{parity.images} probe images."
    )
    return section("Drift", "drift", intro, outputs, parts_chart(found))


def parts_chart(found: ExportResults) -> Html:
    """Return the drift of every named part: in floors, and in int8, which is its own floor, of the spread."""
    parity = found.parity
    if not parity.parts:
        return paragraph("Part by part it was not measured: no value inside the file could be read.")
    numbers = table(
        "Drift of each part",
        ("part", "drift", "its noise floor", "in floors", "share of its spread"),
        [
            (
                part.part,
                f"{part.drift:.3g}",
                f"{part.noise_floor:.3g}",
                f"{part.in_floors:.2f}",
                f"{part.share:.2g}",
            )
            for part in parity.parts
        ],
        kind="figures",
    )
    chart = of_spread(parity) if parity.precision == "int8" else of_floors(parity)
    return Html(chart + folded("As numbers", numbers))


def of_floors(parity: ParityReport) -> Html:
    """Return the drift of every part in multiples of the floor there."""
    largest = max(parity.floors_allowed, *(part.in_floors for part in parity.parts))
    rows = [
        Bar(label=part.part, value=part.in_floors, text=f"{part.in_floors:.2f} floors")
        for part in parity.parts
    ]
    marks = ((1.0, "1 floor"), (parity.floors_allowed, f"{parity.floors_allowed:g} allowed"))
    chart = bars("parts", "Drift of each part in multiples of its noise floor", rows, largest, marks)
    return figure(chart, "Drift where each part ends, against the floor there.")


def of_spread(parity: ParityReport) -> Html:
    """Return how far int8 is from the float32 graph where each part ends."""
    rows = [Bar(label=part.part, value=part.share, text=percent(part.share)) for part in parity.parts]
    largest = max(part.share for part in parity.parts)
    chart = bars("parts", "How far each part is from float32, as a share of its spread", rows, largest)
    return figure(
        chart,
        "Root mean square distance from the float32 graph where each part ends, over the standard deviation "
        "of the values there. Where it grows, int8 costs.",
    )


def gate_section(found: ExportResults) -> Html | None:
    """Return which components the gate chose; None for a network without a gate."""
    routes = found.parity.routing
    if routes is None:
        return None
    images = found.parity.images
    rows = [
        Bar(label=f"component {number}", value=count / images, text=percent(count / images, 0))
        for number, count in enumerate(routes.usage)
    ]
    fair = sum(routes.usage) / (images * len(routes.usage))
    chart = bars(
        "usage",
        "Share of probe images that chose each component",
        rows,
        1.0,
        ((fair, f"even: {percent(fair)}"),),
    )
    said = (
        f"The gate keeps {round(fair * len(routes.usage))} of {len(routes.usage)} components for an image. "
        f"On {routes.unsteady} of {images} probe images it was unsure: its margin was within twice what its "
        f"logits may drift ({routes.tolerance:.3g}). The file chose other components for {routes.flips} of "
        f"those and for {routes.wrong} of the others."
    )
    return section("The gate", "gate", paragraph(said), figure(chart, "Expert usage on the probe images."))


def spectral_section(found: ExportResults) -> Html | None:
    """Return what holds of each second-order part; None where there is none."""
    records = found.parity.spectral
    if not records:
        return None
    rows = [
        (
            record.part,
            str(record.iterations),
            f"{record.residual:.3g}",
            f"{record.residual_exact:.3g}",
            f"{record.asymmetry:.3g}",
        )
        for record in records
    ]
    heads = ("part", "steps", "residual as it ships", "residual in float64", "asymmetry")
    note = (
        "The residual is the distance of the squared root from its matrix that so many steps leave by design."
    )
    return section(
        "Second-order parts", "spectral", table("Roots", heads, rows, kind="figures"), paragraph(note)
    )


def precision_section(found: ExportResults) -> Html:
    """Return the types of the parts, what int8 costs by layer, and the answers before and after."""
    report = found.precision
    kinds = report.summary()
    chart = bars(
        "types",
        "Parts with weights of each type",
        [Bar(label=name, value=count, text=f"{count} parts") for name, count in kinds.items()],
        max(kinds.values(), default=1),
    )
    parts = table(
        "Type of each part",
        ("part", "weights", "operations"),
        [
            (
                part.part,
                part.weights or "none",
                ", ".join(f"{count} in {name}" for name, count in part.operations.items()) or "none",
            )
            for part in report.parts
        ],
    )
    return section(
        "Precision",
        "precision",
        paragraph(f"The bundle's precision is {report.precision}."),
        figure(chart, "Weights by type, read off the graph that ships."),
        *([] if report.accuracy is None else [accuracy_table(report.accuracy)]),
        *([] if report.quantisation is None else [costs_chart(found)]),
        folded("Every part", parts),
    )


def accuracy_table(found: Accuracy) -> Html:
    """Return the answers of the float32 graph and of the one that ships, on the same pictures."""
    rows = [
        ("same top class", f"{found.agree} of {found.images} ({percent(found.low)} to {percent(found.high)})")
    ]
    if found.before is not None and found.after is not None:
        rows += [
            ("top-1 in float32", percent(found.before, 2)),
            ("top-1 as it ships", percent(found.after, 2)),
        ]
    rows.append(("lost", f"{found.drop:.2f} points"))
    return table(f"What the precision costs, on {found.images} pictures", ("", ""), rows)


def costs_chart(found: ExportResults) -> Html:
    """Return how far quantising each part and each layer alone moves the logits."""
    report = found.precision.quantisation
    if report is None or not report.costs:
        return paragraph("No layer alone moves the logits.")
    layers, parts = (
        bars(
            f"{one}-costs",
            f"How far int8 in one {one} alone moves the logits",
            [Bar(label=cost.part, value=cost.share, text=percent(cost.share)) for cost in costs],
            costs[0].share,
        )
        for one, costs in (("layer", report.costs), ("part", report.parts))
    )
    return Html(
        figure(parts, "Each part of the network in int8 alone, as a share of the logits' spread.")
        + figure(
            layers,
            f"The dearest of {report.layers} int8 layers, as a share of the logits' spread; ranges by "
            f"{report.calibration} on {report.images} pictures.",
        )
    )
