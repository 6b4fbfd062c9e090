"""The file of an export: the captured network in ONNX, in the precision of the export."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import onnx
from onnxruntime import InferenceSession

from sopdeploy.base.files import GRAPH, GRAPH_DATA
from sopdeploy.bundle.decision import Decision
from sopdeploy.bundle.graph_properties import GraphProperties
from sopdeploy.bundle.onnx_root import NO_WEIGHTS, onnx_root
from sopdeploy.bundle.sealed import view_file
from sopdeploy.errors import LoweringError
from sopdeploy.version import __version__
from sopdeploy_export.capture.deployed import output_names
from sopdeploy_export.lower.accuracy import AccuracyCheck
from sopdeploy_export.lower.precision import (
    NO_IMAGES,
    Converted,
    Lowered,
    PrecisionReport,
    convert_precision,
)
from sopdeploy_export.lower.to_onnx import lower, without_values
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.progress import step
from sopdeploy_export.prove.networks import Compared
from sopdeploy_export.prove.plain_run import measure_plain_run
from sopdeploy_export.runs import PlainOutputs, open_session
from sopdeploy_export.subject import ExportSubject


class ExportedFile(NamedTuple):
    """The file of an export.

    Attributes:
        session: It, loaded.
        num_bytes: Its size, with the file of its weights if there is one.
        converted: What it was made of, without the values of large weights.
        precision: What it lost in a reduced precision, also on photos if there are some.
        root: The graph hash of the certified float32 graph.
        shipped_root: The graph hash of the file.
    """

    session: InferenceSession
    num_bytes: int
    converted: Converted
    precision: PrecisionReport
    root: str
    shipped_root: str


def _lower_trained(
    trained: Compared,
    plain: PlainOutputs,
    parts: tuple[str, ...],
    options: ExportOptions,
    folder: Path,
) -> onnx.ModelProto:
    """Convert the network *trained* to ONNX in float32.

    If this fails, its run *plain* is compared with the graph, from which *parts* are removed. Weights that do
    not fit into the graph are written to *folder*, but not for int8, which must have them in it.
    """
    weights_folder = None if options.precision == "int8" else folder
    try:
        return lower(trained.program, output_names(trained.network), weights_folder)
    except LoweringError:
        # The cause can be a graph that is not the network's.
        measure_plain_run(trained, plain, options.max_batch, parts)
        raise


def write_file(
    trained: Compared,
    plain: PlainOutputs,
    subject: ExportSubject,
    options: ExportOptions,
    folder: Path,
    accuracy_check: AccuracyCheck | None,
) -> ExportedFile:
    """Convert the network *trained* to ONNX, then to the precision; write the file to *folder* and load it.

    *plain* is its plain run. The file names the classes and the rules of *subject*, for programs that get it
    without the bundle.
    """
    parts = subject.detachment.training_only
    preprocess = subject.preprocess
    decision = subject.decision or Decision()
    user_images = NO_IMAGES if accuracy_check is None else accuracy_check.images_to_convert()

    with TemporaryDirectory(dir=folder.parent) as temporary:
        # The graph in float32. The file of its weights, if there is one, is exported only in this precision.
        step("converting to ONNX")
        float32_folder = folder if options.precision == "fp32" else Path(temporary)
        model = _lower_trained(trained, plain, parts, options, float32_folder)
        root = onnx_root(model, _weights_in(float32_folder))

        # The precision.
        if options.precision != "fp32":
            step(f"converting the graph to {options.precision}")
        certified = Lowered(trained.network, trained.program, model)
        converted = convert_precision(certified, preprocess, options, user_images, folder)
        shipped_root = root
        if options.precision != "fp32":
            shipped_root = onnx_root(converted.model, _weights_in(folder))
        properties = GraphProperties(
            sopdeploy=__version__,
            project=subject.project,
            labels=subject.labels,
            preprocess=preprocess,
            batch=options.batch,
            precision=options.precision,
            temperature=decision.divisor,
        )
        onnx.helper.set_model_props(converted.model, properties.to_texts())
        (folder / GRAPH).write_bytes(converted.model.SerializeToString(deterministic=True))

        # Free the weights before the runtime loads them again.
        converted = replace(converted, model=without_values(converted.model))
        float32 = None if accuracy_check is None else model
        del certified, model

        session = open_session(folder / GRAPH)
        precision = converted.precision
        if accuracy_check is not None and float32 is not None:
            accuracy = accuracy_check.measure(float32, session, _weights_in(float32_folder))
            precision = precision.model_copy(update={"accuracy": accuracy})
            accuracy_check.check_drop(precision)

    return ExportedFile(
        session=session,
        num_bytes=sum(path.stat().st_size for path in folder.iterdir()),
        converted=converted,
        precision=precision,
        root=root,
        shipped_root=shipped_root,
    )


def _weights_in(folder: Path) -> memoryview:
    """Return the weights of the graph in *folder* that are in a file of their own."""
    path = folder / GRAPH_DATA
    return view_file(path) if path.exists() else NO_WEIGHTS
