"""The sections about what was measured: drift, answers, the gate, second-order parts, precision."""

from sopdeploy.html.amounts import percent
from sopdeploy.html.charts import Bar, bars, interval
from sopdeploy.html.markup import Html, figure, folded, paragraph, section, table
from sopdeploy_export.findings import Findings
from sopdeploy_export.parity.report import Flip
from sopdeploy_export.precision_report import Accuracy

BECAUSE = {
    "noise": "noise: the network itself was unsure",
    "routing": "routing: the gate was unsure",
    "error": "error: the network was sure",
}


def drift_section(found: Findings) -> Html:
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


def parts_chart(found: Findings) -> Html:
    """Return the drift of every named part as a bar, in multiples of the floor there."""
    parity = found.parity
    if not parity.parts:
        return paragraph("Part by part it was not measured: an int8 graph has other values inside.")
    largest = max(parity.floors_allowed, *(part.in_floors for part in parity.parts))
    rows = [
        Bar(label=part.part, value=part.in_floors, text=f"{part.in_floors:.2f} floors")
        for part in parity.parts
    ]
    marks = ((1.0, "1 floor"), (parity.floors_allowed, f"{parity.floors_allowed:g} allowed"))
    numbers = table(
        "Drift of each part",
        ("part", "drift", "its noise floor", "in floors"),
        [
            (part.part, f"{part.drift:.3g}", f"{part.noise_floor:.3g}", f"{part.in_floors:.2f}")
            for part in parity.parts
        ],
        kind="figures",
    )
    chart = bars("parts", "Drift of each part in multiples of its noise floor", rows, largest, marks)
    return Html(
        figure(chart, "Drift where each part ends, against the floor there.") + folded("As numbers", numbers)
    )


def answers_section(found: Findings) -> Html:
    """Return how often the top class agrees, with its interval, and every flip."""
    top1 = found.parity.top1
    said = (
        f"The top class is the network's on {top1.agree} of {top1.images} probe images; so many images bound "
        f"the true share to {percent(top1.low)} to {percent(top1.high)} (Wilson's interval at 95 %)."
    )
    chart = interval(
        "agreement", "Share of images with the same top class", top1.agree / top1.images, top1.low, top1.high
    )
    flips = (
        table(
            f"Flips: {top1.flips_within_noise} noise, {top1.flips_by_routing} routing, {top1.flips} wrong",
            ("image", "network says", "file says", "network's margin", "put down to"),
            [flip_row(flip, found.checkpoint.labels) for flip in top1.flipped],
        )
        if top1.flipped
        else paragraph("No answer flips.")
    )
    return section(
        "Answers", "answers", paragraph(said), figure(chart, "Seen, and the 95 % interval."), flips
    )


def flip_row(flip: Flip, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return one flip as a row."""
    return (
        str(flip.image),
        labels[flip.network],
        labels[flip.file],
        f"{flip.margin:.3g}",
        BECAUSE[flip.because],
    )


def gate_section(found: Findings) -> Html | None:
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


def spectral_section(found: Findings) -> Html | None:
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


def precision_section(found: Findings) -> Html:
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


def costs_chart(found: Findings) -> Html:
    """Return how far quantising each layer alone moves the logits."""
    report = found.precision.quantisation
    if report is None or not report.costs:
        return paragraph("No layer alone moves the logits.")
    rows = [Bar(label=cost.part, value=cost.share, text=percent(cost.share)) for cost in report.costs]
    chart = bars("costs", "How far int8 in one layer alone moves the logits", rows, report.costs[0].share)
    return figure(
        chart,
        f"The dearest of {report.layers} int8 layers, as a share of the logits' spread; ranges by "
        f"{report.calibration} on {report.images} pictures.",
    )
