"""Copy, for a network of the user: its exported copy computes what the given network computes.

The network that the user gave is captured, not a copy, because its classes can define how they
are copied.

Refused: a class that copies itself as something else (`COPIES` in
`tests/attacks/planted/graphs.py`).
"""

import torch
from torch import Tensor, nn

from sopdeploy.errors import LoweringError
from sopdeploy.models.base import is_in
from sopdeploy_export.admit.outputs import check_finite, run_and_check
from sopdeploy_export.admit.state import find_oddity
from sopdeploy_export.capture.deployed import Deployed, generated_images
from sopdeploy_export.capture.program import Capture, Captures, capture_any_batch
from sopdeploy_export.network import modules, tensors
from sopdeploy_export.program_hashes import value_root
from sopdeploy_export.prove.tensors import prove_values_unread, randomized
from sopdeploy_export.state import ObjectId, attributes_restored, read_state

STATEMENT = (
    "The exported copy of a network of your own computes what the given network computes."
)
CALLED = ("forward", "_call_impl", "_wrapped_call_impl")  # methods that a call of a module runs
LAYOUT_TOLERANCE = (
    1e-4  # of the largest logit, because rounding depends on the layout of weights
)
GPU_TOLERANCE = 1e-2  # of the largest logit, because a GPU may use TF32
OTHER_COPY = (
    "a copy of the network with contiguous weights computes something else than the network: its code must "
    "not depend on the memory layout, and its classes must not define how they are copied"
)


def code_of_calls(network: nn.Module, removed: tuple[str, ...]) -> nn.Module:
    """Return a module that holds the hooks and replaced methods that calls of modules of *network* run.

    Those of *removed* parts are left out. `read_state` reads what these reach, without what
    other attributes of *network* reach.
    """
    found = nn.Module()
    vars(found)["code"] = [
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            [vars(module).get(name) for name in CALLED],
        )
        for name, module in modules(network)
        if not is_in(name, *removed)
    ]
    return found


def prove_copy(
    given: nn.Module,
    copied: nn.Module,
    captures: Captures,
    classes: int | None,
    parts: tuple[str, ...],
    *,
    with_features: bool,
) -> Capture:
    """Capture *given*, the user's network, or *copied*, which is exported; check that they compute the same.

    They can differ because a class can define how it is copied. Both networks run on probe
    images. Unless *given* is on a GPU, their graphs are compared, too: here, or by `certify`,
    for which *captures* then has the program of *given* as that of *copied*. The graph of
    *given* must stay the same while its *parts* have random values, which something that was
    not copied with them can read. Raises `LoweringError`
    if the networks differ, and `CertificateError` if the graph depends on the *parts*.
    """
    preprocess = captures.preprocess
    stored = list(tensors(given).values())
    devices = {tensor.device for tensor in stored} or {torch.device("cpu")}
    # of the images; the network itself moves values between several
    device = next(iter(devices))
    on_cpu = devices == {torch.device("cpu")}
    # Stored as in *copied*
    is_exact = on_cpu and all(tensor.is_contiguous() for tensor in stored)
    tolerance = LAYOUT_TOLERANCE if on_cpu else GPU_TOLERANCE
    images = torch.from_numpy(generated_images(preprocess.crop))
    deployed = Deployed(given, preprocess).eval()
    deployed.normalise.to(device)
    for batch in (images, images[:1]):
        # Caches are empty again when the networks are captured.
        with attributes_restored(given), attributes_restored(copied):
            expected = run_and_check(deployed, batch.to(device), "given", classes).cpu()
            logits = run_and_check(
                Deployed(copied, preprocess).eval(), batch, "trained", classes
            )
        check_finite(expected, "given")
        allowed = 0.0 if is_exact else tolerance * expected.abs().max()
        if not bool(((logits - expected).abs() <= allowed).all()):
            raise LoweringError(OTHER_COPY)
    is_odd = find_oddity(given, "given") is not None  # also in *parts*
    if is_odd:  # a hook of the copy can still be code of *given*
        originals = {id(module) for _, module in modules(given)}
        state = read_state(code_of_calls(copied, parts))
        if any(
            isinstance(leaf, ObjectId) and id(leaf.value) in originals
            for leaf in state.values()
        ):
            raise LoweringError(OTHER_COPY)
    # With features, the exported network has one output more than *given*.
    if is_exact and not with_features:
        capture = captures.of(given)
        if is_odd and captures.of(copied).root != capture.root:
            raise LoweringError(OTHER_COPY)
        captures.share(copied, capture)
        if parts:
            prove_values_unread(given, parts, captures, capture)
            captures.note_unread(copied, parts)
        return capture
    capture = captures.of(copied)
    if {tensor.untyped_storage().data_ptr() for tensor in stored} & {
        tensor.untyped_storage().data_ptr()
        for tensor in capture.program.constants.values()
        if isinstance(tensor, Tensor)
    }:
        raise LoweringError(OTHER_COPY)  # code of the copy still uses tensors of *given*
    if on_cpu:  # the graph of a network on a GPU names it, so it cannot be compared
        with randomized(given, parts):
            program = capture_any_batch(given, preprocess, captures.batch)
        captures.note_unread(copied, parts)
        # These ignore the layout
        if value_root(program).sha256 != value_root(capture.program).sha256:
            raise LoweringError(OTHER_COPY)
    return capture
