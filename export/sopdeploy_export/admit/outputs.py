"""Checks of what a network returns and changes when it runs, and of how its graph ends."""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sopdeploy.errors import (
    CertificateError,
    ConfigError,
    LoweringError,
    SopdeployError,
    amount,
    first_line,
)
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.admit.written import written_attributes
from sopdeploy_export.capture.deployed import Deployed, generated_images
from sopdeploy_export.capture.program import DEPENDS_ON_VALUES, Capture
from sopdeploy_export.program_hashes import SAME_VALUES, operator_name
from sopdeploy_export.state import (
    NOT_IN_EVAL,
    STATELESS,
    InPlaceWrites,
    PythonReads,
    changes,
    first_change,
    read_state,
)

_IMAGES = 4  # probes that are computed eagerly
SUM_TOLERANCE = 1e-3  # of probabilities
# What torch says of `cond`, `while_loop`, `scan` and `map`.
CONTROL_FLOW = re.compile(r"(?:HOP|HigherOrderOperator) (\w+) and mode")
# What torch says of `item` and `if` on several values, as at an exit of a single image.
READS_ONE_VALUE = re.compile(r"converted to Scalar|more than one value is ambiguous")
# Operators whose result has values of their first operand.
SUBSET_OF_VALUES = {
    *SAME_VALUES, "aten._to_copy", "aten.permute", "aten.transpose", "aten.expand", "aten.slice",
    "aten.select", "aten.dropout",
}  # fmt: skip


class FirstRuns(NamedTuple):
    """What the first runs of a network show.

    Attributes:
        filled: The first attribute that the first two runs change, such as a cache, if any.
        written: The attributes that the last two runs change, too; no run may read them (`check_unread`).
        warnings: Findings that do not stop the export.
    """

    filled: str | None
    written: tuple[str, ...]
    warnings: tuple[str, ...]


def check_first_runs(
    deployed: Deployed, preprocess: Preprocess, classes: int | None, role: str
) -> FirstRuns:
    """Run the network twice on four probe images and twice on one; check shape, finiteness and state.

    Raises the errors of `check_finite`, and `LoweringError` if the network fails, returns no
    (B, classes) logits, returns probabilities or reads tensors in Python code, or if the last
    two runs change other state than attributes of modules, or return other logits.
    """
    images = torch.from_numpy(generated_images(preprocess.crop)[-_IMAGES:])
    network = deployed.network
    before = read_state(network)
    first_logits = run_and_check(deployed, images, role, classes)
    run_and_check(deployed, images[:1], role, classes)
    after_first = read_state(network)
    # Writes and reads are recorded for one image only: four images cause the same.
    with InPlaceWrites(network) as writes, PythonReads() as reads:
        run_and_check(deployed, images[:1], role, classes)
    logits = run_and_check(deployed, images, role, classes)
    # A write through `tensor.data` changes no version, so `first_change` misses it and `writes`
    # has it.
    changed = [*changes(after_first, read_state(network)), *writes.written]
    written = () if writes.written else written_attributes(network, changed)
    if changed and not written:
        raise LoweringError(
            f"{changed[0]} changes while the {role} network runs; {NOT_IN_EVAL}"
        )
    if reads.first is not None:
        raise LoweringError(
            f"Python code of the {role} network reads tensors ({reads.first}); a graph has one path for all "
            "images and layouts, as with torch.where"
        )
    check_finite(logits, role)
    if not torch.equal(first_logits, logits):
        raise LoweringError(
            f"the {role} network returns other logits in a second run, as random numbers do"
        )
    warnings = []
    if torch.equal(logits, logits[:1].expand_as(logits)):
        warnings.append(
            f"the {role} network returns the same logits for every probe image; is it trained?"
        )
    if bool((logits >= 0).all() and ((logits.sum(dim=1) - 1).abs() < SUM_TOLERANCE).all()):
        raise LoweringError(
            f"the {role} network returns probabilities, to which the service would apply a softmax; return "
            "the logits before its softmax, or the logarithms of the probabilities"
        )
    return FirstRuns(first_change(before, after_first), written, tuple(warnings))


def check_finite(logits: Tensor, role: str) -> None:
    """Raise `LoweringError`, or `CertificateError` for the detached network, unless *logits* are finite."""
    if not bool(torch.isfinite(logits).all()):
        # Those of the trained network were finite, so a stub's NaN is in these
        if role == "detached":
            raise CertificateError(
                "the output depends on a removed part: without its values, the logits are NaN or infinite; "
                "keep this part",
                setting="training_only",
            )
        raise LoweringError(
            f"the {role} network returns NaN or infinite logits for a probe image; the probes include "
            "images of one color, so add a small constant wherever it divides, such as by a norm"
        )


def run_and_check(
    deployed: nn.Module, images: Tensor, role: str, classes: int | None
) -> Tensor:
    """Compute the logits (B, classes) of *images*; all errors of the user's code become `LoweringError`.

    With None, any number of *classes* is accepted; another number of logits is a `ConfigError`.
    """
    size = len(images)
    try:
        with torch.no_grad():
            logits: Tensor = deployed(images)[0]
    except SopdeployError:
        raise
    except Exception as error:  # the user's code
        if operation := CONTROL_FLOW.search(str(error)):
            raise LoweringError(
                f"the {role} network uses torch.{operation[1]}; a graph has no control flow: compute all "
                "branches, and choose with torch.where"
            ) from error
        problem = f"the {role} network fails for {size} images: {first_line(error)}"
        if READS_ONE_VALUE.search(problem):
            problem += f"; {DEPENDS_ON_VALUES}"
        raise LoweringError(problem) from error
    shape = tuple(logits.shape)
    is_table = type(logits) is Tensor and len(shape) == 2 and shape[0] == size
    if is_table and classes is not None and shape[1] != classes:
        raise ConfigError(
            f"{amount(classes, 'name')} for {amount(shape[1], 'logit')} of the {role} network; give "
            "one name per logit, in their order",
            setting="labels",
        )
    if type(logits) is not Tensor or shape != (
        size,
        shape[-1] if classes is None and shape else classes,
    ):
        raise LoweringError(
            f"the {role} network returns {shape} for {size} images, not ({size}, {classes or 'classes'}): "
            "one row per image, also for a single one, and one logit per label"
        )
    return logits


def check_ends_in_logits(program: ExportedProgram) -> None:
    """Raise `LoweringError` if the logits of *program* are the results of a sigmoid."""
    aten = torch.ops.aten
    node, *_ = program.graph.output_node().args[0]  # the logits are the first output
    while operator_name(node) in SUBSET_OF_VALUES:
        node = node.args[0]
    if node.target in (
        aten.sigmoid.default,
        aten.hardsigmoid.default,
        aten.special_expit.default,
    ):
        raise LoweringError(
            "the trained network ends in a sigmoid, and the service applies a softmax or a sigmoid "
            "itself; return the logits before it and, if an image may have several classes,",
            remedies={"several_classes": True},
        )


def check_unchanged_by_run(path: str, captured: Capture, filled: Capture) -> None:
    """Check that a network computes the same after its first run, which changed the attribute at *path*.

    *filled* is the program after that run. Raises `LoweringError`.
    """
    if not filled.computes_values_of(captured):
        raise LoweringError(
            f"{path} changes while the trained network runs, which computes something else afterwards; "
            f"{STATELESS}"
        )
