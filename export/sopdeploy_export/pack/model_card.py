"""Write the model card of a bundle, `README.md`, and the page about an export."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from sopdeploy.environment import EXACT_INT8
from sopdeploy.files import atomic_write, writing
from sopdeploy.html.report import HtmlReport, Section, Table, insert_names, render, sanitize
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.training.summary import training_rows
from sopdeploy_export.pack.results import Exported, ExportResults
from sopdeploy_export.prove.certificate import STATEMENTS, evidence_of
from sopdeploy_export.subject import ExportSubject

MAX_LABELS = 20
# An underscore between two letters or digits emphasizes nothing. GitHub makes links of "www."
# and "://".
MARKDOWN = re.compile(
    r"([\\`*\[\]#~|!@]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.|:(?=//))", re.IGNORECASE
)
# The statement of the certificate that a fact is about
STATEMENT_OF = {
    "removed": "Removed",
    "kept": "Removed",
    "graph": "Graph",
    "plain run": "Plain run",
    "batch": "Images",
    "numerical error": "File",
    "top class": "File",
}
INT8_SESSION = f"""
In your own program, open model.onnx with this option. Without it, ONNX Runtime computes other results on
x86 processors without VNNI:

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("{EXACT_INT8[0]}", "{EXACT_INT8[1]}")
    session = onnxruntime.InferenceSession("model.onnx", options)
"""


def write_page(exported: Exported, labels: Sequence[str]) -> Path:
    """Write the page about the bundle of *exported*, for people, beside the bundle; return its path.

    Raises `StorageError` if it cannot be written.
    """
    facts = exported.facts()
    bundle = str(exported.path)
    path = exported.path.with_name(f"{exported.path.name}.html")

    # How it compares with the trained network, and the first of its classes.
    difference = "differs from the trained one"
    if exported.parity.passed:
        difference = "predicts like the trained one"
    shown = labels[:MAX_LABELS]
    more = f" and {len(labels) - MAX_LABELS} more" if len(labels) > MAX_LABELS else ""
    classes = f"{len(labels)} classes: {', '.join(['{}'] * len(shown))}{more}"

    content = HtmlReport(
        title=exported.manifest.project,
        text=[
            insert_names("Network: {}", exported.network),
            f"The exported network {difference}: top class {facts['top class']}; {facts['batch']}.",
            insert_names(classes, *shown),
            insert_names("Next: {}", f"sopdeploy serve {quote(bundle)}", tag="code"),
        ],
        tiles={
            "megabytes": f"{exported.parity.file_bytes / 1e6:.1f}",
            "million parameters": f"{exported.shipped.parameters / 1e6:.2f}",
            "million multiply-adds": f"{exported.shipped.macs / 1e6:,.0f}",
        },
        sections=[
            Section(title="Warnings", text=exported.warnings),
            Section(
                title="What was proved and measured",
                tables=[_facts_table(facts), _statements_table()],
            ),
            Section(
                title="Use",
                text=[
                    insert_names(
                        "Check it on this machine: {}",
                        f"sopdeploy verify {quote(bundle)}",
                        tag="code",
                    ),
                    insert_names(
                        "Classify: {}",
                        f"sopdeploy predict {quote(bundle)} photo.jpg",
                        tag="code",
                    ),
                    insert_names(
                        "Serve, with a web page: {}",
                        f"sopdeploy serve {quote(bundle)}",
                        tag="code",
                    ),
                ],
            ),
        ],
    )
    with writing(path), atomic_write(path) as partial:
        partial.write_text(render(content), encoding="utf-8")
    return path


def _facts_table(facts: Mapping[str, str]) -> Table:
    """List *facts*, with links to the statements that they are about."""
    names = [STATEMENT_OF.get(fact, "") for fact in facts]
    return Table(
        caption="All facts",
        columns=["what", "result", "statement"],
        rows=[(*fact, name) for fact, name in zip(facts.items(), names, strict=True)],
        links={(row, 1): _anchor(name) for row, name in enumerate(names) if name},
    )


def _statements_table() -> Table:
    """List what the statements of the certificate say, and whether they are proved or measured."""
    rows = [
        (f"{number}. {name}", evidence_of(name), module.STATEMENT)
        for number, (name, module) in enumerate(STATEMENTS.items(), 1)
    ]
    return Table(
        caption="The export stops at the first statement that does not hold. A proved statement holds for images and "
        "weights of any values. A measured one held on the images that the export ran. None says how accurate the "
        "network is.",
        columns=["statement", "how it is known", "what holds"],
        rows=rows,
        names=[_anchor(name) for name in STATEMENTS],
    )


def _anchor(name: str) -> str:
    return f"statement-{name.lower().replace(' ', '-')}"


def render_model_card(
    subject: ExportSubject, results: ExportResults, fields: Mapping[str, Any]
) -> str:
    """Render the model card as Markdown; *fields* are those of the manifest.

    Classes, facts and training records, which a checkpoint can fill with anything, become text
    without markup.
    """
    preprocess = subject.preprocess
    batch = fields["batch"]

    # Classes and outputs.
    labels = ", ".join(map(as_markdown, subject.labels[:MAX_LABELS]))
    if len(subject.labels) > MAX_LABELS:
        labels += f", ... ({len(subject.labels)} in total, see labels.json)"
    outputs = ", ".join(
        f"`{output.name}`: {output.dtype}, (batch, {', '.join(str(size) for size in output.shape[1:])})"
        for output in fields["outputs"]
    )

    # Lists of the training and of the results.
    rows = training_rows(subject.training)
    training = "\n".join(
        f"- {as_markdown(key)}: {as_markdown(str(value))}" for key, value in rows
    )
    described = results.facts()
    logits = described.pop("logits", "")  # belongs to the outputs
    facts = "\n".join(f"- {name}: {as_markdown(text)}" for name, text in described.items())

    resizing = _describe_resizing(preprocess)  # the template ends the sentence
    graying = ""
    if preprocess.channels == 1:
        graying = "the graph makes it\ngray (ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B);\n"
    int8 = results.precision.quantisation
    session = INT8_SESSION if int8 is not None and int8.runtime == "cpu" else ""
    return f"""# {subject.project}

An image classifier, the network {as_markdown(results.network)}, exported by
sopdeploy {fields["versions"]["sopdeploy"]}.

Classes: {labels}

## Use

    sopdeploy verify .
    sopdeploy predict . photo.jpg
    sopdeploy serve .
{session}
## Input and output

`{fields["inputs"][0].name}`: uint8, (batch, {preprocess.crop}, {preprocess.crop}, 3), RGB. {resizing}
{graying}the graph subtracts the mean and divides by the standard deviation. Batches of {batch.minimum} to
{batch.maximum} images. {outputs}{f". Logits: {as_markdown(logits)}." if logits else ""}

## Training

{training or "Not recorded."}

## Proof and measurements

{facts}

The network's rounding error is the largest difference between its own runs in {results.parity.precision} and in
float64. model.onnx was compared in {results.parity.runtime} ({results.parity.provider}). `certificate.json`
lists removed tensors and hashes, `parity.json` the numerical error of every output.
"""


def _describe_resizing(preprocess: Preprocess) -> str:
    """Say how an image gets the size of the input, with line breaks as in the model card; ends in ";"."""
    by = preprocess.interpolation
    side = preprocess.crop
    if preprocess.fit == "crop":
        return f"Resize the\nshorter side of an image to {preprocess.resize} pixels ({by}), then crop the center;"
    if preprocess.fit == "pad":
        return (
            f"Resize the\nlonger side of an image to {side} pixels ({by}), then center it on RGB "
            f"{preprocess.background};"
        )
    if preprocess.fit == "squash-crop":
        return (
            f"Resize both\nsides of an image to {preprocess.resize} pixels ({by}) and crop the center to\n"
            f"{side} x {side};"
        )
    return f"Resize both\nsides of an image to {side} pixels ({by});"


def as_markdown(text: str) -> str:
    """Write *text* on one line such that Markdown shows it as it is, without links, markup or HTML."""
    shown = sanitize(" ".join(text.split()))
    return MARKDOWN.sub(
        r"\\\1", shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )
