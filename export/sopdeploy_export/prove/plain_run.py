"""Plain run: the network, run as users run it, gives the outputs of its captured graph.

This is measured, not proved. The network runs in eval mode and without gradients, with torch's
fast path, in batches of `SIZES`, on the images of `export_images`, before it is captured
(`run_as_users_do`). Its outputs may differ from its graph's by rounding, because sums can have
another order. The file of the graph has run on these images already (`images`), so the graph itself
only runs where the file gives something else.
The run of a single image is repeated after all others, and after the capture; the first run is
repeated while the removed tensors hold other values. All must give the same bits.

Not seen: code that does something else only for images that resemble none of these, in larger
batches, or after many more runs.

Refused: code that does something else while it is captured
(`test_a_plain_run_that_gives_something_else_is_refused`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from sopdeploy.bundle.logit_ranges import LogitRanges
from sopdeploy.errors import CertificateError, SopdeployError, first_line, shorten
from sopdeploy.models.base import is_in
from sopdeploy_export.capture.deployed import STATELESS
from sopdeploy_export.network import modules
from sopdeploy_export.program_hashes import are_equal
from sopdeploy_export.prove.networks import Compared
from sopdeploy_export.runs import (
    FLOAT32_EPS,
    MOST_ROUNDINGS,
    REPEATED,
    Arrays,
    PlainOutputs,
    divide,
    run_batch,
    without_fast_path,
)

STATEMENT = (
    "The network, run as PyTorch code, gives the same outputs as its graph, except for rounding. It runs in "
    "batches of the sizes that the certificate lists. Some images are dark, saturated or letterboxed, or have "
    "one color in one half. A repeated run gives the same bits, and so does a run with other values in the "
    "removed tensors."
)
IS_PROVED = False
USE_TENSORS = (
    "its code must depend neither on the batch size, on earlier runs, or on being exported, nor on values of "
    "images, unless by operators such as torch.where"
)
GIVES_OTHERS = (
    f"a second run of the network gives other outputs; {STATELESS}, and draw random numbers only if "
    "self.training"
)
FAST_PATH = (
    "only torch's fast path of nn.TransformerEncoder does so: it sets the tokens to 0 that "
    "src_key_padding_mask leaves out; build it with enable_nested_tensor=False, or pool the other tokens only"
)
# torch.export left a tensor without content in an object that is not restored.
USES_EARLIER = f"the network's code uses what an earlier run computed; {STATELESS}"
_SEED = 20_261_126


class PlainRuns(NamedTuple):
    """The sizes of the batches that ran, and what does not stop an export."""

    batches: tuple[int, ...]
    warnings: tuple[str, ...]


def measure_plain_run(
    trained: Compared,
    plain: PlainOutputs,
    largest_batch: int,
    parts: tuple[str, ...],
    of_file: Arrays | None = None,
) -> PlainRuns:
    """Compare *plain*, a run of the network *trained* in batches of at most *largest_batch*, with its graph.

    *parts* of the network are removed. *of_file* are the outputs of its file in float32 by name, if it ran
    on the same images. Raises `CertificateError` for the first run that differs.
    """
    names = [*plain.images]
    images = torch.from_numpy(np.stack([*plain.images.values()]))
    network = trained.deployed

    # Rounding of each class is measured by its own range over all images, because a large constant logit
    # would hide a difference of the others.
    limits = [rounding_limits(plain.outputs[0]), *[None] * (len(plain.outputs) - 1)]

    # Batch by batch; the graph itself runs only where the file gives something else.
    batches = divide(images, largest_batch)
    start = 0
    for batch in batches:
        # Without the repeated images that fill the batch.
        rows = slice(start, start + len(batch))
        outputs = [output[rows] for output in plain.outputs]
        file_rows = None
        if of_file is not None:
            file_rows = [torch.from_numpy(output[rows]) for output in of_file.values()]
        if file_rows is None or find_difference(outputs, file_rows, limits) is not None:
            captured = run_plainly(trained.graph, batch)
            of_images = [output[: len(outputs[0])] for output in captured]
            place = find_difference(outputs, of_images, limits)
            if place is not None:
                name = names[start + place]
                raise _describe_difference(name, network, batch, captured, limits)
        start += len(batch)

    # An image alone, after all others; then after the capture.
    alone = batches[REPEATED]
    start = sum(map(len, batches[:REPEATED]))
    expected = [output[start : start + len(alone)] for output in plain.outputs]
    _check_equal(expected, plain.repeated, GIVES_OTHERS)
    _check_equal(expected, run_plainly(network, alone), GIVES_OTHERS)

    # The first batch with other removed tensors.
    removed = [tensor for name, tensor in trained.tensors.items() if is_in(name, *parts)]
    if removed:
        first = batches[0]
        expected = [output[: len(first)] for output in plain.outputs]
        with other_values(removed):
            changed = run_plainly(network, first)
        problem = (
            f"the network gives other outputs if {shorten(list(parts))} has other values; "
            "the outputs must not depend on what is removed"
        )
        _check_equal(expected, changed, problem, "training_only")

    return PlainRuns(tuple(sorted({*map(len, batches)})), _warn_of_nan(names, plain.outputs))


def _check_equal(
    expected: Sequence[Tensor],
    outputs: Sequence[Tensor],
    problem: str,
    setting: str | None = None,
) -> None:
    """Raise `CertificateError` with *problem* unless *outputs* have the bits of *expected*."""
    if not all(map(are_equal, expected, outputs)):
        raise CertificateError(problem, setting=setting)


def _describe_difference(
    name: str,
    network: nn.Module,
    batch: Tensor,
    captured: Sequence[Tensor],
    limits: Sequence[Tensor | None],
) -> CertificateError:
    """Return the error of a plain run of *network* on *batch* whose outputs for image *name* are not *captured*.

    *limits* are those of `find_difference`.
    """
    # Runs that differ from each other, as with Python's random numbers, have another cause than the graph.
    first, second = (run_plainly(network, batch) for _ in range(2))
    if not all(map(are_equal, first, second)):
        return CertificateError(GIVES_OTHERS)

    # The cause is the fast path, which no graph takes, if runs with and without it differ.
    with without_fast_path():
        slow = run_plainly(network, batch)
    is_fast_path = (
        _has_fast_path(network)
        and find_difference(slow, captured, limits) is None
        and find_difference(first, captured, limits) is not None
    )
    where = "alone" if len(batch) == 1 else f"in a batch of {len(batch)}"
    return CertificateError(
        f"for {name} {where}, a plain run of the network gives other outputs than "
        f"its graph; {FAST_PATH if is_fast_path else USE_TENSORS}"
    )


def _has_fast_path(network: nn.Module) -> bool:
    """Tell whether a layer of *network* can give other outputs on torch's fast path."""
    return any(isinstance(module, nn.TransformerEncoder) for _, module in modules(network))


def _warn_of_nan(names: Sequence[str], outputs: Sequence[Tensor]) -> tuple[str, ...]:
    """Write a warning of the images, by their *names*, for which one of *outputs* (P, ...) has NaN."""
    undefined = [
        name
        for number, name in enumerate(names)
        if any(bool(output[number].isnan().any()) for output in outputs)
    ]
    if not undefined:
        return ()
    return (
        f"the network gives NaN for {shorten(undefined)}; its file can give numbers, because ONNX Runtime's "
        "maximum leaves out NaN",
    )


def run_plainly(run: Any, images: Tensor) -> tuple[Tensor, ...]:
    """Return copies of the outputs of *run*, a network or its graph, for *images*, as a user gets them.

    Raises `CertificateError` if its code fails.
    """
    try:
        outputs = run_batch(run, images)
    except SopdeployError:
        raise
    except Exception as error:  # the network's own code
        problem = f"a plain run of the network fails: {first_line(error)}"
        if "FakeTensor" in problem:
            problem = USES_EARLIER
        raise CertificateError(problem) from error

    if any(isinstance(output, FakeTensor) for output in outputs):
        raise CertificateError(USES_EARLIER)
    return outputs


def rounding_limits(logits: Tensor) -> Tensor:
    """Return how far the logits of each class (C,) may differ by rounding; *logits* (P, C) are of a plain run.

    It is `MOST_ROUNDINGS` of the range of the class over the images, but at least `LogitRanges.rounding`.
    """
    ranges = LogitRanges.of(logits.numpy())
    of_range = MOST_ROUNDINGS * FLOAT32_EPS * ranges.spread
    return torch.from_numpy(np.maximum(of_range, ranges.rounding))


def find_difference(
    plain: Sequence[Tensor],
    captured: Sequence[Tensor],
    limits: Sequence[Tensor | None],
) -> int | None:
    """Return the number of the first image for which outputs differ by more than rounding; None if none does.

    *limits* say by output how much rounding explains; it is never more than `MOST_ROUNDINGS` of the largest
    value of *captured*, which is what None stands for.
    """
    for output, expected, given in zip(plain, captured, limits, strict=True):
        if output.shape != expected.shape:
            return 0
        largest = expected.nan_to_num(0, 0, 0).abs().max()  # without NaN and infinities
        limit = MOST_ROUNDINGS * FLOAT32_EPS * largest.double()
        if given is not None:
            limit = torch.minimum(given, limit)
        is_equal = (output == expected) | (output.isnan() & expected.isnan())
        is_close = is_equal | ((output.double() - expected.double()).abs() <= limit)
        differing = (~is_close).flatten(1).any(1).nonzero()
        if len(differing):
            return int(differing[0])
    return None


@contextmanager
def other_values(tensors_to_change: Sequence[Tensor]) -> Iterator[None]:
    """Fill tensors with other values in the block; restore them afterwards.

    These are random numbers from 0 to 1, the same ones in each call; 1 for integers and truth values.
    """
    generator = torch.Generator().manual_seed(_SEED)
    saved = [tensor.detach().clone() for tensor in tensors_to_change]

    try:
        for tensor in tensors_to_change:
            if tensor.is_floating_point():
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator))
            else:
                tensor.data.fill_(1)
        yield
    finally:
        for tensor, content in zip(tensors_to_change, saved, strict=True):
            tensor.data.copy_(content)
