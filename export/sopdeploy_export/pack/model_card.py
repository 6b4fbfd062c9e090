"""Write the model card of a bundle, `README.md`, and the page about an export."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from sopdeploy.base.environment import EXACT_INT8
from sopdeploy.base.files import atomic_write, writing
from sopdeploy.html.report import (
    NO_BREAK_SPACE,
    HtmlReport,
    Section,
    Table,
    insert_names,
    render,
    sanitize,
)
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.training.records.summary import training_rows
from sopdeploy_export.pack.results import Exported, ExportResults
from sopdeploy_export.prove.certificate import EXPLAINED
from sopdeploy_export.subject import ExportSubject

MAX_LABELS = 20
# An underscore between two letters or digits emphasizes nothing. GitHub makes links of "www."
# and "://".
MARKDOWN = re.compile(
    r"([\\`*\[\]#~|!@]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.|:(?=//))", re.IGNORECASE
)
MARKS = {True: "✓", False: "!", None: "-"}  # whether a statement holds, as `Check.holds` says
# Front matter for the Hugging Face Hub. Only the owner of the network knows its license.
HUB_FIELDS = """---
pipeline_tag: image-classification
library_name: sopdeploy
license: unknown
---
"""
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
    bundle = str(exported.path)
    path = exported.path.with_name(f"{exported.path.name}.html")

    # How it compares with the trained network, and the first of its classes.
    predicts = "differs from the trained one"
    if exported.parity.passed:
        predicts = "predicts like the trained one"
    facts = exported.facts()
    top_class = facts["top class"]
    shown = labels[:MAX_LABELS]
    more = f" and {len(labels) - MAX_LABELS} more" if len(labels) > MAX_LABELS else ""
    classes = f"{len(labels)} classes: {', '.join(['{}'] * len(shown))}{more}"

    content = HtmlReport(
        title=exported.headline,
        text=[
            f"The exported network {predicts}: the top class is {top_class}.",
            insert_names(f"Project {{}}, {classes}", exported.manifest.project, *shown),
            insert_names("Next: {}", f"sopdeploy serve {quote(bundle)}", tag="code"),
        ],
        tiles={unit: _arrow(change) for unit, change in exported.sizes().items()},
        sections=[
            Section(title="Warnings", text=exported.warnings),
            Section(title="What was checked", tables=[_checks_table(exported)]),
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
            Section(
                title="All facts",
                folded=True,
                tables=[
                    Table(
                        caption="Also in the README.md of the bundle",
                        columns=["what", "result"],
                        rows=[*facts.items()],
                    )
                ],
            ),
        ],
    )
    with writing(path), atomic_write(path) as partial:
        partial.write_text(render(content), encoding="utf-8")
    return path


def _arrow(change: str) -> str:
    """Write *change*, of two numbers, with an arrow that stays on the line of the second number."""
    return change.replace(" -> ", f" →{NO_BREAK_SPACE}")


def _checks_table(exported: Exported) -> Table:
    """List what was proved and measured, and name the page that explains it."""
    rows = [
        (f"{MARKS[check.holds]} {check.statement}", check.evidence, check.text)
        for check in exported.checks()
    ]
    return Table(
        caption=f"{EXPLAINED} explains these statements. None of them says how accurate the network is.",
        columns=["statement", "how it is known", "what holds"],
        rows=rows,
    )


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
    decision = () if results.decision is None else results.decision.rows()
    training = "\n".join(
        f"- {as_markdown(key)}: {as_markdown(str(value))}" for key, value in (*rows, *decision)
    )
    described = results.facts()
    logits = described.pop("logits", "")  # belongs to the outputs
    checks = "\n".join(
        f"- {check.evidence}: {as_markdown(check.text)}" for check in results.checks()
    )
    facts = "\n".join(f"- {name}: {as_markdown(text)}" for name, text in described.items())

    resizing = _describe_resizing(preprocess)  # the template ends the sentence
    graying = ""
    if preprocess.channels == 1:
        graying = "the graph makes it\ngray (ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B);\n"
    if preprocess.color_order == "BGR":
        graying = "the graph puts blue\nfirst;\n"
    int8 = results.precision.quantisation
    session = INT8_SESSION if int8 is not None and int8.runtime == "cpu" else ""
    return f"""{HUB_FIELDS}
# {subject.project}

An image classifier: {as_markdown(results.headline)}. Exported by sopdeploy {fields["versions"]["sopdeploy"]}.

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

{checks}

{facts}

The network's rounding error is the largest difference between its own runs in {results.parity.precision} and in
float64. model.onnx was compared in {results.parity.runtime} ({results.parity.provider}). `certificate.json`
lists removed tensors and hashes, `parity.json` the numerical error of every output.
"""


def _describe_resizing(preprocess: Preprocess) -> str:
    """Say how an image gets the size of the input, with line breaks as in the model card; ends in ";"."""
    by: str = preprocess.interpolation
    if not preprocess.antialias:
        by += " without antialiasing, like OpenCV"
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
