"""Checks of what a network returns, and of how its graph ends."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from sopdeploy.bundle.logit_ranges import OWN_ROUNDING, LogitRanges
from sopdeploy.errors import (
    ConfigError,
    LoweringError,
    SopdeployError,
    amount,
    first_line,
    shorten,
)
from sopdeploy_export.capture.deployed import EXPORT_TWO_CLASSES, Deployed
from sopdeploy_export.capture.failures import DEPENDS_ON_VALUES, failing_line
from sopdeploy_export.capture.program import Trace
from sopdeploy_export.network import attributes_restored, tensors
from sopdeploy_export.program_hashes import operator_name
from sopdeploy_export.runs import PlainOutputs, run_as_users_do

SUM_TOLERANCE = 1e-3  # of probabilities, and of the length of an embedding
# Of 36 untrained networks of timm with 2, 3 and 7 classes, 3 have logits within 0 and 1 for all images,
# and these vary by less than 0.05. Sigmoids of logits that vary by 1 to 2 vary by 0.29 to 0.46.
MIN_SPREAD = 0.25
# What torch says of `item` and `if` on several values: code can be written for a single image.
READS_ONE_VALUE = re.compile(r"converted to Scalar|more than one value is ambiguous")
# And what it, or a network, says of an image of another size.
IS_OF_SIZE = re.compile(
    r"\b(shapes?|sizes?|dim(ension)?s?|height|width|resolution)\b", re.IGNORECASE
)
# Operators whose result has only values of their first operand, or of the list that it is, and
# constants; also in another shape or type.
SUBSET_OF_VALUES = (
    "aten.clone", "aten.contiguous", "aten.alias", "aten.detach", "aten.lift_fresh_copy", "aten.view",
    "aten._unsafe_view", "aten.reshape", "aten.squeeze", "aten.unsqueeze", "aten.flatten", "aten.unflatten",
    "aten.view_copy", "aten._reshape_copy", "aten._reshape_alias", "aten._to_copy", "aten.permute",
    "aten.transpose", "aten.expand", "aten.slice", "aten.select", "aten.dropout",
    "aten.cat", "aten.stack", "aten.pad", "aten.constant_pad_nd",
)  # fmt: skip


def run_first(
    deployed: Deployed,
    images: Mapping[str, NDArray[np.uint8]],
    classes: int | None,
    largest: int,
) -> PlainOutputs:
    """Run the network on uint8 *images* (H, W, 3), by name, in batches of at most *largest*; check its outputs.

    Afterwards, it is as before. With None, any number of *classes* is accepted. Raises the errors
    of `run_and_check`.
    """

    def run(pixels: Tensor) -> tuple[Tensor, ...]:
        return run_and_check(deployed, pixels, classes)

    with attributes_restored(deployed):
        return run_as_users_do(run, images, largest)


def check_trained_are_registered(trace: Trace) -> None:
    """Raise `LoweringError` if the captured code uses a trainable tensor that no module of its network registers.

    Training can have changed it, and no weight file holds it, whatever its size: a parameter in a
    list or in a global variable.
    """
    tensor = trace.unregistered
    if tensor is not None:
        raise LoweringError(
            f"the output depends on a trainable tensor of shape {tuple(tensor.shape)} that is not a registered "
            "parameter, so no weight file contains it; use ModuleList, ParameterList or register_parameter",
            remedies={"allow_constants": True},
        )


def check_finite(needed: Mapping[str, Tensor], logits: Tensor) -> None:
    """Raise `LoweringError` if *logits* (P, C), or tensors that the network needs, are not finite.

    *needed* are these tensors by name. An infinite weight is accepted if the logits are finite, as
    in the mask of an attention; NaN and an infinite running statistic never are. With such a
    statistic, a batch norm returns the same values for all images, and the logits can be finite.
    A class may be minus infinity for all images, as networks mask it, unless all classes are.
    """
    not_masked = _without_masked(logits)
    is_finite = bool(torch.isfinite(not_masked).all()) and not_masked.shape[1] > 0

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
            "the trained network returns NaN or infinite logits for a reference image; "
            "some of these have one color, so add a small constant "
            "wherever it divides, such as by a norm"
        )


def _without_masked(logits: Tensor) -> Tensor:
    """Return *logits* (P, C) without the classes that are minus infinity for all images."""
    return logits[:, ~torch.isneginf(logits).all(dim=0)]


def is_completed(network: nn.Module, logits: Tensor) -> bool:
    """Return whether a logit of 0 was put before the single one of *network*, which gives *logits* (P, C)."""
    return EXPORT_TWO_CLASSES in vars(network) and not bool(logits[:, 0].any())


def name_constant_classes(
    network: nn.Module, logits: Tensor, labels: Sequence[str]
) -> tuple[str, ...]:
    """Return a warning that names the *labels* whose logit of *network* is the same in all rows of *logits* (P, C).

    The 0 that a single logit was completed with is not named.
    """
    was_completed = is_completed(network, logits)
    values = logits[0].tolist()
    is_constant_C = (logits == logits[0]).all(dim=0).tolist()
    named = [
        f"{label} ({value:.5g})"
        for number, (label, value) in enumerate(zip(labels, values, strict=True))
        if is_constant_C[number] and not (was_completed and number == 0)
    ]
    if not named or len(logits) == 1:
        return ()
    return (
        f"the logit of {shorten(named)} is the same for every reference image, as of a masked class: is it meant?",
    )


def check_depends_on_images(
    network: nn.Module,
    logits: Tensor,
    *,
    several_classes: bool,
    allowed: bool | None,
    advice: str,
) -> tuple[str, ...]:
    """Raise `LoweringError` if *network* says the same of all images; a warning if *allowed*.

    Its *logits* (P, C) are then equal for all images or, without *several_classes*, differ by a number
    that all classes have in common, which changes no probability. Nothing could be compared then.
    *allowed* is None where nothing is exported, so no option could allow it. *advice* is part of the
    message. If a tensor of *network* is not finite, which can be the reason, it is left to
    `check_finite`, which names this tensor.
    """
    kind = ""
    ranges = LogitRanges.of(logits.numpy())
    if not (ranges.spread > ranges.rounding).any():
        kind = "logits"
    elif logits.shape[1] > 1 and not several_classes:
        ordinary = logits[:, torch.from_numpy(ranges.is_ordinary)]
        centered = ordinary - ordinary.mean(dim=1, keepdim=True)
        spread = (centered.amax(dim=0) - centered.amin(dim=0)).amax()
        # The means round by more than each logit.
        kind = "" if spread > OWN_ROUNDING * ordinary.abs().amax() else "probabilities"
    if len(logits) == 1 or not kind:
        return ()
    not_masked = _without_masked(logits)
    if not all(
        bool(torch.isfinite(tensor).all())
        for tensor in (not_masked, *tensors(network).values())
    ):
        return ()

    problem = f"the trained network returns the same {kind} for every reference image"
    if allowed:
        return (f"{problem}; is it trained?",)
    if allowed is None:
        raise LoweringError(f"{problem}; {advice}")
    raise LoweringError(
        f"{problem}; {advice}; to export it as it is,",  # the remedy completes the sentence
        remedies={"allow_numerical_error": True},
    )


def check_logits(logits: Tensor, *, several_classes: bool = False) -> tuple[str, ...]:
    """Return a warning if *logits* (P, C) have the values of something else; raise `LoweringError` for probabilities.

    Logits count as probabilities if none is negative and they sum to 1 for each image. The service
    applies a sigmoid to them with *several_classes* and to a single logit, otherwise a softmax.
    Images with logits that are not finite are left out of this.
    """
    # `check_finite` refuses the others, when it is known which tensors the network needs.
    finite = _without_masked(logits)
    finite = finite[torch.isfinite(finite).all(dim=1)]
    if not finite.numel():
        return ()

    activation = "sigmoid" if several_classes or finite.shape[1] == 1 else "softmax"
    if _sums_to(1, finite):
        remedy = ", or the logarithms of the probabilities" if activation == "softmax" else ""
        raise LoweringError(
            f"the trained network returns probabilities, to which the service would apply a {activation}; "
            f"return the logits before its softmax{remedy}"
        )

    if _are_embeddings(finite):
        return (
            "the network seems to return embeddings (each row has the length 1), not logits; return the logits "
            "of its classifier",
        )

    kind = _kind_of_values(finite)
    if kind is None:
        return ()
    if kind.startswith("log") and activation == "softmax":
        return (
            f"the network returns {kind}; the service applies a softmax, which undoes the logarithm",
        )
    return (
        f"the network seems to return {kind}, and the service applies a {activation} to them; "
        "unless they are logits, return the logits before the last activation of the network",
    )


def _sums_to(total: float, values: Tensor) -> bool:
    """Tell whether no number of *values* (P, C) is negative and each row sums to *total*."""
    is_sum = ((values.sum(dim=1) - total).abs() < SUM_TOLERANCE * total).all()
    return bool((values >= 0).all()) and bool(is_sum)


def _are_embeddings(values: Tensor) -> bool:
    """Tell whether each row of *values* (P, C) has the length 1, as `F.normalize` returns it."""
    lengths = values.double().norm(dim=1)
    return values.shape[1] > 1 and bool(((lengths - 1).abs() < SUM_TOLERANCE).all())


def _kind_of_values(outputs: Tensor) -> str | None:
    """Say what *outputs* (P, C) of a network seem to be, if their ranges are not those of logits."""
    if _sums_to(100, outputs):
        return "percentages (each row sums to 100)"
    if float(outputs.max()) <= 0 and _sums_to(1, outputs.exp()):
        return "log probabilities (the exponentials of each row sum to 1)"

    # Logits of a barely trained network can lie within 0 and 1, too, but are nearly equal.
    is_within = float(outputs.min()) >= 0 and float(outputs.max()) <= 1
    spread = float((outputs.amax(dim=0) - outputs.amin(dim=0)).max())
    if is_within and spread >= MIN_SPREAD:
        return "probabilities (all values are within 0 and 1)"
    return None


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
        where = f"{amount(size, 'image')}{failing_line(error)}"
        problem = f"the trained network fails for {where}: {first_line(error)}"
        if READS_ONE_VALUE.search(problem):
            problem += f"; {DEPENDS_ON_VALUES}"
        elif IS_OF_SIZE.search(problem) and "channel" not in problem:
            _, height, width, _ = images.shape
            problem += (
                f"; preprocess makes images of {height} x {width}: for another size, give rules such as "
                "imagenet:SIZE or Preprocess(crop=SIZE)"
            )
        raise LoweringError(problem) from error

    # The logits must be a table with a row for each image.
    logits = outputs[0]
    shape = tuple(logits.shape)
    is_table = type(logits) is Tensor and len(shape) == 2 and shape[0] == size
    if not is_table:
        problem = (
            f"the trained network returns {shape} for {amount(size, 'image')}, not "
            f"({size}, {classes or 'classes'}): one row per image, also for a "
            "single one, and one logit per label"
        )
        if shape in ((), (size,)):
            problem += (
                "; a network with one logit returns (B, 1), so omit its squeeze or flatten"
            )
        raise LoweringError(problem)

    # Its columns must be the classes.
    if classes is not None and classes > 2 and shape[1] == 1:
        raise ConfigError(
            f"{classes} names for one logit of the trained network; one logit tells two classes "
            "apart, so give two names: first the class of label 0, then the class of label 1",
            setting="labels",
        )
    if classes is not None and shape[1] != classes:
        raise ConfigError(
            f"{amount(classes, 'name')} for {amount(shape[1], 'output')} of the trained network; give "
            "one name per logit, in their order; if the outputs are an embedding, return the logits of its "
            "classifier",
            setting="labels",
        )
    return outputs


def check_ends_in_no_sigmoid(program: ExportedProgram) -> None:
    """Raise `LoweringError` if the logits of *program* are the results of a sigmoid.

    `check_logits` finds the results of a softmax by their values, which sum to 1. Those of a
    sigmoid do not.
    """
    aten = torch.ops.aten
    sigmoids = (aten.sigmoid.default, aten.hardsigmoid.default, aten.special_expit.default)
    node, *_ = program.graph.output_node().args[0]  # the logits are the first output

    # Go back to the operators that compute their values, past those that only choose some of them,
    # join them, or change their shape or dtype.
    pending = [node]
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        seen.add(node)
        if operator_name(node) in SUBSET_OF_VALUES:
            operands = node.args[0] if isinstance(node.args[0], list | tuple) else node.args[:1]
            pending += [operand for operand in operands if operand not in seen]

    if any(node.target in sigmoids for node in seen):
        raise LoweringError(
            "the trained network ends in a sigmoid, and the service applies a softmax or a sigmoid "
            "itself; return the logits before it and, if an image may have several classes,",
            # completes the sentence
            remedies={"several_classes": True},
        )
