"""`report.html`: one page that needs no network and no script, light or dark, on paper or a telephone."""

from sopdeploy.html.markup import Html, document, join, paragraph, percent, short, size, tag
from sopdeploy_export.report.measurements import (
    drift_section,
    gate_section,
    precision_section,
    spectral_section,
)
from sopdeploy_export.report.results import ExportResults
from sopdeploy_export.report.sections import (
    answers_section,
    files_section,
    lowering_section,
    network_section,
    proof_section,
    speed_section,
)

LABELS_SHOWN = 20


def render(found: ExportResults) -> str:
    """Return the page; the same findings give the same text."""
    title = f"{found.checkpoint.model}: what was exported"
    sections = (
        network_section(found),
        proof_section(found),
        lowering_section(found),
        drift_section(found),
        answers_section(found),
        gate_section(found),
        spectral_section(found),
        precision_section(found),
        speed_section(found),
        files_section(found),
    )
    return document(title, header(found), *(one for one in sections if one is not None))


def header(found: ExportResults) -> Html:
    """Return the name, the figures that matter most, and the classes."""
    parity, counts = found.parity, found.network_summary
    removed = found.certificate.bytes_removed
    tiles = {
        "taken off": size(removed) if removed else "nothing",
        "parameters": f"{short(counts.shipped.parameters)} of {short(counts.trained.parameters)}",
        "multiply-adds": f"{short(counts.shipped.macs)} of {short(counts.trained.macs)}",
        "precision": found.precision.precision,
        "drift": f"{parity.logits.drift_in_floors:.1f} floors",
        "same answer": percent(parity.top1.agree / parity.top1.images),
        "model.onnx": size(parity.file_bytes),
    }
    if found.speed is not None:
        first = found.speed.rows[0]
        tiles["one image"] = f"{first.ours_ms:.1f} ms"
    labels = ", ".join(found.checkpoint.labels[:LABELS_SHOWN])
    more = len(found.checkpoint.labels) - LABELS_SHOWN
    state = (
        "Everything below held, or this bundle would not exist."
        if parity.passed
        else "The numbers drift by more than is allowed; that was accepted when the bundle was exported."
    )
    return tag(
        "header",
        tag("h1", found.checkpoint.model),
        tag("p", state, class_=None if parity.passed else "warning"),
        tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in tiles.items())),
        paragraph(
            f"{len(found.checkpoint.labels)} classes: ",
            join([labels, f" and {more} more, see labels.json" if more > 0 else ""]),
        ),
    )
