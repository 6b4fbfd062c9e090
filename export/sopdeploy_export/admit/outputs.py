"""Checks of what a network returns, and of how its graph ends."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sopdeploy.errors import (
    ConfigError,
    LoweringError,
    SopdeployError,
    amount,
    first_line,
)
from sopdeploy_export.capture.deployed import Deployed
from sopdeploy_export.capture.failures import DEPENDS_ON_VALUES
from sopdeploy_export.network import attributes_restored
from sopdeploy_export.program_hashes import operator_name
from sopdeploy_export.runs import ProbeOutputs

SUM_TOLERANCE = 1e-3  # of probabilities
# What torch says of `item` and `if` on several values: code can be written for a single image.
READS_ONE_VALUE = re.compile(r"converted to Scalar|more than one value is ambiguous")
# Operators whose result has only values of their first operand, also in another shape or type.
SUBSET_OF_VALUES = (
    "aten.clone", "aten.contiguous", "aten.alias", "aten.detach", "aten.lift_fresh_copy", "aten.view",
    "aten._unsafe_view", "aten.reshape", "aten.squeeze", "aten.unsqueeze", "aten.flatten", "aten.unflatten",
    "aten.view_copy", "aten._reshape_copy", "aten._reshape_alias", "aten._to_copy", "aten.permute",
    "aten.transpose", "aten.expand", "aten.slice", "aten.select", "aten.dropout",
)  # fmt: skip


def run_first(deployed: Deployed, images: Tensor, classes: int | None) -> ProbeOutputs:
    """Run the network on uint8 *images* (P, H, W, 3), and check its outputs; afterwards, it is as before.

    With None, any number of *classes* is accepted. Raises the errors of `run_and_check`.
    """

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        return run_and_check(deployed, pixels, classes)

    with attributes_restored(deployed):
        return ProbeOutputs.of(run, images)


def check_finite(needed: Mapping[str, Tensor], logits: Tensor) -> None:
    """Raise `LoweringError` if *logits* (P, C), or tensors that the network needs, are not finite.

    *needed* are these tensors by name. An infinite weight is accepted if the logits are finite, as
    in the mask of an attention; NaN and an infinite running statistic never are. With such a
    statistic, a batch norm returns the same values for all images, and the logits can be finite.
    """
    is_finite = bool(torch.isfinite(logits).all())

    for name, tensor in needed.items():
        is_statistic = name.endswith(("running_mean", "running_var"))
        may_be_infinite = is_finite and not is_statistic
        is_broken = torch.isnan(tensor) if may_be_infinite else ~torch.isfinite(tensor)
        if bool(is_broken.any()):
            raise LoweringError(
                f"{name} holds NaN or infinite values; train again or use an earlier checkpoint"
            )

    if not is_finite:
        raise LoweringError(
            "the trained network returns NaN or infinite logits for a probe image; "
            "the probes include images of one color, so add a small constant "
            "wherever it divides, such as by a norm"
        )


def check_logits(logits: Tensor) -> tuple[str, ...]:
    """Return a warning if the *logits* (P, C) are equal for all images; raise `LoweringError` for probabilities.

    Logits count as probabilities if none is negative and they sum to 1 for each image. Images with
    logits that are not finite are left out of this.
    """
    # `check_finite` refuses the others, when it is known which tensors the network needs.
    finite = logits[torch.isfinite(logits).all(dim=1)]
    sums_to_one = bool(((finite.sum(dim=1) - 1).abs() < SUM_TOLERANCE).all())
    if len(finite) and bool((finite >= 0).all()) and sums_to_one:
        raise LoweringError(
            "the trained network returns probabilities, to which the service would "
            "apply a softmax; return the logits before its softmax, or the "
            "logarithms of the probabilities"
        )

    if torch.equal(logits, logits[:1].expand_as(logits)):
        return (
            "the trained network returns the same logits for every probe image; is it trained?",
        )
    return ()


def run_and_check(
    deployed: nn.Module, images: Tensor, classes: int | None
) -> tuple[Tensor, ...]:
    """Compute the outputs for *images* (B, H, W, 3), of which the first are the logits (B, classes).

    With None, any number of *classes* is accepted. Raises `ConfigError` for another number of
    logits, and `LoweringError` for another shape and for any error of the user's code.
    """
    size = len(images)
    try:
        with torch.no_grad():
            outputs: tuple[Tensor, ...] = deployed(images)
    except SopdeployError:
        raise
    except Exception as error:  # the user's code
        problem = f"the trained network fails for {amount(size, 'image')}: {first_line(error)}"
        if READS_ONE_VALUE.search(problem):
            problem += f"; {DEPENDS_ON_VALUES}"
        raise LoweringError(problem) from error

    # The logits must be a table with a row for each image.
    logits = outputs[0]
    shape = tuple(logits.shape)
    is_table = type(logits) is Tensor and len(shape) == 2 and shape[0] == size
    if not is_table:
        raise LoweringError(
            f"the trained network returns {shape} for {amount(size, 'image')}, not "
            f"({size}, {classes or 'classes'}): one row per image, also for a "
            "single one, and one logit per label"
        )

    # Its columns must be the classes.
    if classes is not None and shape[1] != classes:
        raise ConfigError(
            f"{amount(classes, 'name')} for {amount(shape[1], 'logit')} of the trained network; give "
            "one name per logit, in their order",
            setting="labels",
        )
    return outputs


def check_ends_in_no_sigmoid(program: ExportedProgram) -> None:
    """Raise `LoweringError` if the logits of *program* are the results of a sigmoid.

    `check_logits` finds the results of a softmax by their values, which sum to 1. Those of a
    sigmoid do not.
    """
    aten = torch.ops.aten
    node, *_ = program.graph.output_node().args[0]  # the logits are the first output

    # Go back to the operator that computes their values, past those that only choose some of them,
    # or change their shape or dtype.
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
            # completes the sentence
            remedies={"several_classes": True},
        )
