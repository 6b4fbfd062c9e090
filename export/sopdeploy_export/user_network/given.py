"""Capture the network that the user gave, not a copy of it, and check what its graph contains."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.graph import (
    EXPORT_LOGITS,
    STATELESS,
    Captured,
    Deployed,
    capture,
    capture_any_batch,
    probe_images,
)
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.proof.hashes import value_root
from sopdeploy_export.state import Identity, modules, preserved, read_state, tensors
from sopdeploy_export.user_network.checks import check_finite, run

MAX_CONSTANT = 16  # numbers of a tensor that is no parameter or buffer, such as a mean and a deviation
LAYOUT_TOLERANCE = 1e-4  # of the largest logit, because rounding depends on the layout of weights
GPU_TOLERANCE = 1e-2  # of the largest logit, because a GPU may use TF32
OTHER_COPY = (
    "a copy of the network with contiguous weights computes something else than the network: its code must "
    "not depend on the memory layout, and its classes must not define how they are copied"
)


@contextmanager
def prepared(given: nn.Module, logits: str | int | None) -> Iterator[None]:
    """Put *given*, the user's network, into eval mode, uncompiled, until the block ends."""
    with preserved(given):
        given.eval()
        for _, module in modules(given):
            vars(module)["_compiled_call_impl"] = None
        if logits is not None:
            vars(given)[EXPORT_LOGITS] = logits
        yield


def capture_given(
    given: nn.Module, copied: nn.Module, preprocess: Preprocess, classes: int, options: ExportOptions
) -> Captured:
    """Capture *given*, the user's network, and check that *copied*, which is exported, computes the same.

    Classes can define how they are copied. Both networks run on probe images, and their graphs are compared,
    unless *given* is on a GPU. Raises `LoweringError` if they differ.
    """
    devices = {tensor.device for tensor in tensors(given).values()} or {torch.device("cpu")}
    on_cpu = devices == {torch.device("cpu")}
    same_memory = on_cpu and all(tensor.is_contiguous() for tensor in tensors(given).values())
    images = torch.from_numpy(probe_images(preprocess))
    deployed = Deployed(given, preprocess).eval()
    deployed.normalise.to(next(iter(devices)))
    allowed = 0.0 if same_memory else (LAYOUT_TOLERANCE if on_cpu else GPU_TOLERANCE)
    for batch in (images, images[:1]):
        with preserved(given), preserved(copied):  # caches are empty again when they are captured
            expected = run(deployed, batch.to(next(iter(devices))), "given", classes).cpu()
            logits = run(Deployed(copied, preprocess).eval(), batch, "trained", classes)
        check_finite(expected, "given")
        if not bool(((logits - expected).abs() <= allowed * expected.abs().max()).all()):
            raise LoweringError(OTHER_COPY)
    if same_memory and not options.more_outputs:
        return capture(given, preprocess, options.batch)
    captured = capture(copied, preprocess, options.batch)
    if on_cpu:
        program = capture_any_batch(given, preprocess, options.batch)
        if value_root(program).sha256 != value_root(captured.any_batch).sha256:
            raise LoweringError(OTHER_COPY)
    return captured


def check_constants(captured: Captured, network: nn.Module) -> None:
    """Raise `LoweringError` if a graph contains a large tensor that *network* has not registered."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in tensors(network).values()}
    held = {path: leaf.value for path, leaf in read_state(network).items() if isinstance(leaf, Identity)}
    for program in (captured.any_batch, captured.batch_of_one):
        users = {node.name: node.users for node in program.graph.nodes if node.op == "placeholder"}
        for spec in program.graph_signature.input_specs:
            constant = program.constants.get(spec.target or "")
            if spec.kind != InputKind.CONSTANT_TENSOR or not isinstance(constant, Tensor):
                continue
            derived = constant.untyped_storage().data_ptr() in owned
            if constant.numel() > MAX_CONSTANT and not derived and users[spec.arg.name]:
                where = next(
                    (
                        path
                        for path, value in held.items()
                        if isinstance(value, Tensor) and value.equal(constant)
                    ),
                    f"a tensor of shape {tuple(constant.shape)}",
                )
                raise LoweringError(
                    f"the output depends on {where}, which is no parameter or buffer, so no weight file "
                    "contains it; use ModuleList, ModuleDict or register_buffer",
                    remedies={"allow_constants": True},
                )


def check_cache(path: str, captured: Captured, filled: Captured) -> None:
    """Check that a network computes the same after its first run, which changed the attribute at *path*.

    *filled* are the programs after that run. Raises `LoweringError`.
    """
    pairs = ((captured.any_batch, filled.any_batch), (captured.batch_of_one, filled.batch_of_one))
    if any(value_root(before).sha256 != value_root(after).sha256 for before, after in pairs):
        raise LoweringError(
            f"{path} changes while the trained network runs, which computes something else afterwards; "
            f"{STATELESS}"
        )
