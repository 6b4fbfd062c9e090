"""The admission of a network of the user: what can be captured and stored, and what can be removed.

`export_network` and `sopdeploy inspect` both call `admit`, so the command that `inspect` prints
passes all checks here. What the proof decides is left to the proof.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sopdeploy.base.names import label_problem
from sopdeploy.errors import ConfigError, LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import is_in
from sopdeploy_export.admit.graph_hints import normalizes_itself, returns_cosines
from sopdeploy_export.admit.network import (
    check_exportable,
    check_size,
    check_tensors,
    check_torch_state,
    prepared,
    warn_of_memory,
    weight_bytes,
)
from sopdeploy_export.admit.outputs import (
    check_depends_on_images,
    check_ends_in_no_sigmoid,
    check_finite,
    check_logits,
    is_completed,
    run_and_check,
    run_first,
)
from sopdeploy_export.admit.parts import match_parts
from sopdeploy_export.capture.deployed import (
    Deployed,
    export_images,
    generated_images,
)
from sopdeploy_export.last_layer import add_embedding_output
from sopdeploy_export.network import attributes_restored
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.progress import step
from sopdeploy_export.prove.networks import Compared
from sopdeploy_export.prove.removed import find_shared_rests, find_unneeded, prove_removed
from sopdeploy_export.runs import PlainOutputs

# What a convolution of torch says that takes a gray image, and gets one with three channels.
TAKES_GRAY = re.compile(r"expected input\[\d+, 3, .*?\] to have 1 channels")


@dataclass(frozen=True, kw_only=True, slots=True)
class Admitted:
    """A network of the user that can be captured and stored.

    Attributes:
        trained: It, captured.
        preprocess: Converts an image to its input, see `fit_channels`.
        plain: Its outputs in a plain run.
        parts: The outermost parts to remove.
        num_classes: The number of its logits.
        num_bytes: The bytes of its weights without these parts.
        is_completed: Whether it returns a single logit, which becomes the logits of two classes.
        removable: Further modules and tensors that no output depends on, see `find_unneeded`.
        normalizes_itself: Whether its first operator shifts or scales the channels of its images.
        shared_rests: What parts around these share with the rest, as `find_shared_rests` says.
        warnings: Findings that do not stop the export.
    """

    trained: Compared
    preprocess: Preprocess
    plain: PlainOutputs
    parts: tuple[str, ...]
    num_classes: int
    num_bytes: int
    is_completed: bool
    removable: tuple[str, ...]
    normalizes_itself: bool
    shared_rests: Mapping[str, str]
    warnings: tuple[str, ...]


def admit(
    network: nn.Module,
    preprocess: Preprocess,
    *,
    classes: int | None = None,
    training_only: Sequence[str] = (),
    several_classes: bool = False,
    options: ExportOptions | None = None,
) -> Admitted:
    """Check and capture *network*, which is `prepared`, and find the parts that its outputs do not need.

    With *classes*, it must have so many logits. The other arguments are those of `export_network`.
    Without *options*, nothing is exported. Raises `ConfigError` for another number of logits, or for
    a single one unless *several_classes*, `DetachError` for *training_only*, and `LoweringError` or
    `CertificateError` for *network*.
    """
    parts = _check_before_runs(network, training_only)
    num_bytes = weight_bytes(network, parts)
    if options is None:  # another machine may export it
        size_warnings = warn_of_memory(num_bytes)
        may_be_equal = None
        options = ExportOptions()
    else:
        size_warnings = check_size(num_bytes, options.precision)
        may_be_equal = options.allow_numerical_error

    # It runs once on the images of all later comparisons. If it fails, it may take gray images.
    step("running the network")
    images = export_images(preprocess)
    given = preprocess
    deployed = Deployed(network, preprocess).eval()
    try:
        plain = run_first(deployed, images, classes, options.max_batch)
    except LoweringError:
        preprocess = fit_channels(network, given)
        if preprocess == given:
            raise
        deployed = Deployed(network, preprocess).eval()
        plain = run_first(deployed, images, classes, options.max_batch)
    gray_warnings = _warn_of_gray(given, preprocess)
    logits = plain.outputs[0]
    warnings = _check_values(
        network, logits, classes, several_classes=several_classes, may_be_equal=may_be_equal
    )
    generated = generated_images(preprocess.crop)
    if options.with_features:  # one more output
        add_embedding_output(network, preprocess, generated, logits.shape[1], parts)
        plain = run_first(deployed, images, classes, options.max_batch)

    step("capturing the network")
    trained = Compared.of("trained", network, preprocess, options.batch)
    _check_graph(trained, parts, logits[-len(generated) :])

    removable = find_unneeded(trained, parts)
    return Admitted(
        trained=trained,
        preprocess=preprocess,
        plain=plain,
        parts=parts,
        num_classes=logits.shape[1],
        num_bytes=num_bytes,
        is_completed=is_completed(network, logits),
        removable=removable,
        normalizes_itself=normalizes_itself(trained.program),
        shared_rests=find_shared_rests(trained, removable),
        warnings=(
            *size_warnings,
            *gray_warnings,
            *warnings,
            *(_warn_of_cosines(trained, logits) if not several_classes else ()),
        ),
    )


def _warn_of_cosines(trained: Compared, logits: Tensor) -> tuple[str, ...]:
    """Return a warning if the *logits* (P, C) of *trained* seem to be cosines, whose softmax is nearly even."""
    if not returns_cosines(trained.program, logits):
        return ()
    largest = 1 / (1 + (logits.shape[1] - 1) * math.exp(-2))
    return (
        f"the logits seem to be cosines, from -1 to 1: no probability can be above {100 * largest:.0f} %; return "
        "them multiplied by the scale of the training, or fit one with sopdeploy eval BUNDLE --data IMAGES "
        "--fit-decision bundles",
    )


def fit_channels(network: nn.Module, preprocess: Preprocess) -> Preprocess:
    """Return *preprocess*, with gray images if *network*, which is `prepared`, takes these alone.

    These are the networks whose first convolution says so, and those that fail for an RGB image, but not for a
    gray one. The network runs on one image, and is as before afterwards. Raises `ConfigError` if the mean or the
    standard deviation in *preprocess* has several values, which no gray image has.
    """
    if preprocess.channels == 1:
        return preprocess
    failure = _find_failure(network, preprocess)
    if failure is None:
        return preprocess

    # The mean and standard deviation do not matter for this run.
    gray = preprocess.model_copy(update={"channels": 1, "mean": (0.5,), "std": (0.5,)})
    takes_gray = TAKES_GRAY.search(str(failure.__cause__)) is not None
    if takes_gray or _find_failure(network, gray) is None:
        return preprocess.in_gray()
    return preprocess  # a later run gives the message


def _find_failure(network: nn.Module, preprocess: Preprocess) -> LoweringError | None:
    """Return the error of a run of *network* on one image; None if it succeeds."""
    image = torch.from_numpy(generated_images(preprocess.crop)[:1])
    try:
        with attributes_restored(network):
            run_and_check(Deployed(network, preprocess).eval(), image, None)
    except LoweringError as error:
        return error
    return None


def _warn_of_gray(given: Preprocess, preprocess: Preprocess) -> tuple[str, ...]:
    """Return a warning if the rules *preprocess* of a network have gray images, and the *given* ones have not."""
    if preprocess.channels == given.channels:
        return ()
    return (
        "the network takes gray images: they are made as by Pillow's convert('L'), 0.299 R + 0.587 G + 0.114 B",
    )


def _check_before_runs(network: nn.Module, training_only: Sequence[str]) -> tuple[str, ...]:
    """Check what needs no run of *network*; return its outermost parts that match *training_only*."""
    check_torch_state()
    parts = match_parts(network, training_only)
    check_exportable(network, parts)
    check_tensors(network, parts)
    return parts


def _check_values(
    network: nn.Module,
    logits: Tensor,
    classes: int | None,
    *,
    several_classes: bool,
    may_be_equal: bool | None,
) -> tuple[str, ...]:
    """Check the *logits* (P, C) of *network* for the images of an export; return warnings.

    *may_be_equal* is `allowed` of `check_depends_on_images`. The other arguments and the errors are those
    of `admit`.
    """
    if classes == logits.shape[1] == 1 and not several_classes:
        raise ConfigError(
            "the trained network has one logit, whose softmax is always 1; give two class names "
            "(label 0 first), or keep one name and use the sigmoid of the logit",
            setting="labels",
            remedies={"several_classes": True},
        )

    own_logits = logits[:, 1:] if is_completed(network, logits) else logits
    return (
        *check_depends_on_images(
            network,
            logits,
            several_classes=several_classes,
            allowed=may_be_equal,
            advice="load its trained weights, or check that the image reaches them",
        ),
        *check_logits(own_logits, several_classes=several_classes),
    )


def _check_graph(trained: Compared, parts: tuple[str, ...], logits: Tensor) -> None:
    """Check what the graph of *trained* shows, if *parts* are removed; *logits* (P, C) are those of generated images.

    A tensor with broken values counts if the outputs need it.
    """
    needed = {name: trained.tensors[name] for name in trained.needed if not is_in(name, *parts)}
    check_finite(needed, logits)
    check_ends_in_no_sigmoid(trained.program)
    prove_removed(trained, parts)


def check_labels(labels: Sequence[str]) -> None:
    """Raise `ConfigError` unless *labels* are the names of classes, each once."""
    are_names = bool(labels) and all(isinstance(label, str) for label in labels)
    if not are_names:
        raise ConfigError("give one name per class, each once", setting="labels")
    problem = label_problem(labels)
    if problem:
        raise ConfigError(f"{problem}; rename the class", setting="labels")


def unused_modules(
    network: nn.Module, preprocess: Preprocess, logits_key: str | int | None = None
) -> tuple[str, ...]:
    """Name the outermost modules of *network*, and further tensors, on which no output in eval mode depends.

    Args:
        network: A network as for `export_network`, which stays as it is.
        preprocess: Converts an image to the input of the network.
        logits_key: Attribute, key or index of the logits, if the network returns more than one tensor.

    Returns:
        The names, which `training_only` of `export_network` accepts.

    Raises:
        ConfigError: An argument is invalid.
        LoweringError: The network cannot be captured; the message says why.

    Examples:
        >>> import timm
        >>> network = timm.create_model("test_resnet", num_classes=3)
        >>> network.auxiliary = torch.nn.Linear(8, 3)
        >>> sopdeploy.unused_modules(network, sopdeploy.Preprocess(crop=64))
        ('auxiliary',)
    """
    with prepared(network, logits_key=logits_key) as ready_network:
        return admit(ready_network, preprocess).removable
