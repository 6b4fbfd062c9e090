"""The section on the answers: how often the top class agrees, and every one that does not."""

from collections import Counter
from collections.abc import Sequence

from sopdeploy.html.charts import Axis, Curve, heat, interval, plot
from sopdeploy.html.markup import (
    Html,
    figure,
    folded,
    less,
    paragraph,
    percent,
    section,
    shape,
    short,
    size,
    table,
    tag,
)
from sopdeploy_export.parity.report import Flip
from sopdeploy_export.report.drawing import drawings
from sopdeploy_export.report.results import ExportResults

MOST_CLASSES = 30  # of a matrix that can still be read
BECAUSE = {
    "noise": "noise: the network itself was unsure",
    "routing": "routing: the gate was unsure",
    "error": "error: the network was sure",
}


def answers_section(found: ExportResults) -> Html:
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
        "Answers",
        "answers",
        paragraph(said),
        figure(chart, "Seen, and the 95 % interval."),
        *flip_matrix(top1.flipped, found.checkpoint.labels),
        flips,
    )


def flip_matrix(flipped: Sequence[Flip], labels: tuple[str, ...]) -> list[Html]:
    """Return which class became which, where any did and not more than can be read."""
    classes = sorted({number for flip in flipped for number in (flip.network, flip.file)})
    if not 0 < len(classes) <= MOST_CLASSES:
        return []
    counts = Counter((flip.network, flip.file) for flip in flipped)
    most = max(counts.values())
    names = [labels[number] for number in classes]
    rows = [(labels[said], [counts[said, became] / most for became in classes]) for said in classes]
    numbers = [[str(counts[said, became]) for became in classes] for said in classes]
    matrix = heat("flips", "Answers that flip", rows, names, numbers, wrong_off_diagonal=True)
    return [
        figure(
            matrix,
            "Rows are the network's top class, columns the file's; only the classes of flips, answers that "
            "agree are not counted.",
        )
    ]


def flip_row(flip: Flip, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Return one flip as a row."""
    return (
        str(flip.image),
        labels[flip.network],
        labels[flip.file],
        f"{flip.margin:.3g}",
        BECAUSE[flip.because],
    )


def network_section(found: ExportResults) -> Html:
    """Return the network before and after, and its parts as a table."""
    trained, shipped = found.network_summary.trained, found.network_summary.shipped
    costs = table(
        "What it costs",
        ("", "trained", "shipped", "difference"),
        [
            (
                "parameters",
                f"{trained.parameters:,}",
                f"{shipped.parameters:,}",
                less(trained.parameters, shipped.parameters),
            ),
            ("multiply-adds", f"{trained.macs:,}", f"{shipped.macs:,}", less(trained.macs, shipped.macs)),
        ],
    )
    parts = table(
        "Parts",
        ("part", "what", "output", "parameters", "multiply-adds", ""),
        [
            (
                part.name,
                part.kind,
                shape(part.shape) or "none",
                short(part.parameters),
                short(part.macs),
                "taken off" if part.leaves else "ships",
            )
            for part in found.network_summary.parts
        ],
    )
    note = "Multiply-adds are those of convolutions and linear layers for one image, without bias."
    return section(
        "The network",
        "network-section",
        drawings(found.network_summary),
        costs,
        paragraph(note),
        folded("Every part", parts),
    )


def proof_section(found: ExportResults) -> Html:
    """Return what the certificate says, statement by statement."""
    proof = found.certificate
    gone = (
        f"{len(proof.removed)} tensors ({size(proof.bytes_removed)}) of {', '.join(proof.detached)} were "
        "removed; "
        if proof.removed
        else "Nothing was removed; "
    )
    statements = (
        ("Books.", f"{gone}{len(proof.kept)} tensors were kept, each with the same sha256 before and after."),
        (
            "Graphs.",
            "The graphs of the trained network's answer, of the detached network and of a plain network "
            "built anew with the same weights have one Merkle root over "
            f"{proof.roots.operations} operations.",
        ),
        (
            "Numbers.",
            f"All three give bitwise equal outputs on {proof.images} probe images, "
            f"in batches of {' and '.join(map(str, proof.batches))}.",
        ),
        ("Lowering.", "Their ONNX graphs have one root too."),
    )
    roots = table(
        "Roots: equal roots mean equal graphs, operation by operation",
        ("of", "root"),
        [
            ("the graph for any batch size", proof.roots.any_batch),
            ("the graph for one image", proof.roots.batch_of_one),
            ("the graph as ONNX, before rules", proof.roots.onnx),
            ("the checkpoint (sha256)", found.fields["lineage"].checkpoint_sha256),
            ("model.onnx in this bundle", found.fields["lineage"].onnx_root),
        ],
        kind="hashes",
    )
    items = [tag("li", tag("strong", name), f" {text}") for name, text in statements]
    removed = table(
        "Tensors that were removed",
        ("tensor", "shape", "bytes"),
        [(entry.name, shape(entry.shape) or "one number", f"{entry.bytes:,}") for entry in proof.removed],
    )
    return section(
        "What was proved",
        "proved",
        tag("ol", *items),
        roots,
        *([folded("Every tensor that was removed", removed)] if proof.removed else []),
    )


def lowering_section(found: ExportResults) -> Html:
    """Return the rules that rewrote the graph, with what they needed and did."""
    report = found.lowering
    if report.textbook:
        said = "No rule was asked for: the formulas stand as the papers write them."
    elif not report.rules:
        said = "No rule applies: what ships is the certified graph itself."
    elif report.certified_root == report.lowered_root:
        said = "The certified graph was converted as it is; the rules worked on its ONNX."
    else:
        said = "The certified graph was rewritten before it was converted; each rule was checked in float64."
    rules = table(
        "Rules that were applied",
        ("where", "rule", "because", "effect"),
        [(rule.where, rule.name, rule.precondition, rule.effect) for rule in report.rules],
    )
    forms = table(
        "Forms that were chosen among equal ones",
        ("where", "form", "among", "chosen by"),
        [(choice.where, choice.form, "; ".join(choice.among), choice.by) for choice in report.choices],
    )
    return section(
        "Lowering",
        "lowering",
        paragraph(said),
        *([rules] if report.rules else []),
        *([forms] if report.choices else []),
    )


def files_section(found: ExportResults) -> Html:
    """Return sizes and hashes of the files beside this page, and the versions that made them."""
    files = table(
        "Files of the bundle beside this page; manifest.json has the page's own hash",
        ("file", "bytes", "sha256"),
        [(name, f"{record.bytes:,}", record.sha256) for name, record in found.files.items()],
        kind="hashes",
    )
    versions = table("Versions", ("package", "version"), found.fields["versions"].items())
    operators = table(
        "Operators of model.onnx",
        ("operator", "how often"),
        [(name, str(count)) for name, count in found.parity.operators.items()],
    )
    return section("Files", "files", files, folded("Operators and versions", operators, versions))


def speed_section(found: ExportResults) -> Html:
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
