"""The sections about what was proved and rewritten: the network, the certificate, the rules, the files."""

from sopdeploy.html.amounts import less, shape, short, size
from sopdeploy.html.markup import Html, folded, paragraph, section, table, tag
from sopdeploy_export.findings import Findings
from sopdeploy_export.report_page.drawing import drawings


def network_section(found: Findings) -> Html:
    """Return the network before and after, and its parts as a table."""
    trained, shipped = found.anatomy.trained, found.anatomy.shipped
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
            for part in found.anatomy.parts
        ],
    )
    note = "Multiply-adds are those of convolutions and linear layers for one image, without bias."
    return section(
        "The network",
        "network-section",
        drawings(found.anatomy),
        costs,
        paragraph(note),
        folded("Every part", parts),
    )


def proof_section(found: Findings) -> Html:
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


def lowering_section(found: Findings) -> Html:
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


def files_section(found: Findings) -> Html:
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
