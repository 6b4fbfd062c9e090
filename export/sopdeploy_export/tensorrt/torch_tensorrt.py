"""Build a plan with torch-tensorrt, from the exported program instead of the ONNX graph.

This is an alternative for operators that the ONNX parser rejects. As in the ONNX build, TF32 is off and the
whole network runs in TensorRT. It supports one profile and float32, the precision of the certified
program. torch is imported only here and only on use.
"""

import importlib
from collections.abc import Sequence

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.environment import import_optional
from sopdeploy.errors import EngineError, RuntimeUnavailableError
from sopdeploy.tensorrt.profiles import Profile
from sopdeploy.tensorrt.record import EngineKey

PROGRAM = "network.pt2"
PACKAGE, SOURCE = "torch-tensorrt", "sopdeploy[torch-tensorrt]"


def merge_profiles(profiles: Sequence[Profile], batch: BatchRange) -> Profile:
    """Merge *profiles* into one, tuned for the bundle's optimum batch or the nearest size to it."""
    low, high = profiles[0].minimum, profiles[-1].maximum
    return Profile(minimum=low, optimum=min(max(batch.optimum, low), high), maximum=high)


def check_program(bundle: Bundle, precision: str | None) -> None:
    """Raise `EngineError` unless *bundle* has a float32 program and *precision* is fp32 or None."""
    option = "--via torch-tensorrt"
    own = bundle.manifest.precision
    if own != "fp32":
        raise EngineError(f"{option}: builds only fp32, the bundle is {own}; omit --via")
    if precision not in {None, "fp32"}:
        raise EngineError(f"{option}: builds only fp32, {precision} was requested; omit --precision")
    if PROGRAM not in bundle.manifest.files:
        raise EngineError(f"{bundle.path}: has no {PROGRAM}; export it with --pt2, or omit {option}")


def build_with_torch(bundle: Bundle, key: EngineKey, workspace: int) -> bytes:
    """Build a plan for *key* from the program of *bundle*, with *workspace* bytes.

    Raises `RuntimeUnavailableError` if torch-tensorrt is not installed, `EngineError` with its message if it
    fails.
    """
    torch_tensorrt = import_optional("torch_tensorrt", PACKAGE, SOURCE, RuntimeUnavailableError)
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
    except Exception as problem:  # converters raise any exception class
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise EngineError(f"torch-tensorrt cannot build the engine: {reason}") from problem
    return bytes(plan)
