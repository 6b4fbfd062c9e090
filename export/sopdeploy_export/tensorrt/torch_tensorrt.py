"""Another way to the same plan: torch-tensorrt, from the exported program instead of from ONNX.

A second opinion, and a way around a parser that refuses an operator. It is told what the other way tells
TensorRT: no TF32, one level, all of the network in TensorRT or nothing. It knows one profile only, and
float32, which is what the certified program is. torch is imported where it is needed: nobody else here needs
it.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.environment import import_optional
from sopdeploy.errors import EngineError, RuntimeUnavailableError
from sopdeploy.tensorrt.profiles import Profile
from sopdeploy.tensorrt.record import EngineKey

PROGRAM = "network.pt2"
PACKAGE, SOURCE = "torch-tensorrt", "sopdeploy[torch-tensorrt]"


def one_profile(profiles: Sequence[Profile], batch: BatchRange) -> Profile:
    """Return one profile over all of *profiles*, tuned for the bundle's optimum or the nearest size to it."""
    low, high = profiles[0].minimum, profiles[-1].maximum
    return Profile(minimum=low, optimum=min(max(batch.optimum, low), high), maximum=high)


def refuse_without_program(bundle: Bundle, precision: str | None) -> None:
    """Raise `EngineError` where *bundle* holds no program, or none of the *precision* asked for."""
    if bundle.manifest.precision != "fp32":
        raise EngineError(
            f"--via torch-tensorrt: builds in fp32, the bundle is {bundle.manifest.precision}; "
            "leave --via out"
        )
    if precision not in {None, "fp32"}:
        raise EngineError(
            f"--via torch-tensorrt: builds in fp32, {precision} was asked for; leave --precision out"
        )
    if PROGRAM not in bundle.manifest.files:
        raise EngineError(
            f"{bundle.path}: has no {PROGRAM}; export it with --pt2, or leave --via torch-tensorrt out"
        )


def import_torch_tensorrt() -> Any:
    """Return the torch_tensorrt module, or raise `RuntimeUnavailableError` saying how to get it."""
    return import_optional("torch_tensorrt", PACKAGE, SOURCE, RuntimeUnavailableError)


def build_by_torch(bundle: Bundle, key: EngineKey, workspace: int) -> bytes:
    """Return a plan for *key* of the program in *bundle*, whose hash was checked when it was opened.

    Raises `EngineError` in torch-tensorrt's words where it gives none.
    """
    torch_tensorrt = import_torch_tensorrt()
    torch = importlib.import_module("torch")
    program = torch.export.load(bundle.path / PROGRAM)
    (profile,) = key.profiles
    shape = bundle.manifest.image_shape
    images = torch_tensorrt.Input(
        min_shape=(profile.minimum, *shape),
        opt_shape=(profile.optimum, *shape),
        max_shape=(profile.maximum, *shape),
        dtype=torch.uint8,
    )
    try:
        plan = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
            program,
            arg_inputs=[images],
            disable_tf32=True,
            require_full_compilation=True,
            optimization_level=key.level,
            workspace_size=workspace,
        )
    except Exception as problem:  # converters raise whatever they like
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise EngineError(f"torch-tensorrt cannot build the engine: {reason}") from problem
    return bytes(plan)
