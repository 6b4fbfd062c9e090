"""Build a TensorRT plan from the certified program with torch-tensorrt.

This is a second way to a plan, beside TensorRT's ONNX parser. The plan has the tensors of the
bundle, so that the same runtime serves it after the same probes.
"""

from collections.abc import Callable

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sopdeploy.base.environment import import_optional
from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import EngineError, RuntimeUnavailableError, first_line
from sopdeploy_service.runtime.tensorrt_cache import Profile


def build_from_program(
    bundle: Bundle,
    read_program: Callable[[], ExportedProgram],
    profile: Profile,
    workspace: int,
) -> bytes:
    """Convert the program of *bundle* to a plan for the batches of *profile*; *workspace* is in bytes.

    *read_program* returns the program in float32. Raises `RuntimeUnavailableError` without
    torch-tensorrt or a GPU, and `EngineError` if the bundle has another precision or the build
    fails.
    """
    # Refuse a wrong precision and a missing torch-tensorrt before `read_program` captures the
    # program again.
    manifest = bundle.manifest
    if manifest.precision != "fp32":
        raise EngineError(
            f"{bundle.path}: is in {manifest.precision}, but the certified program is in float32; omit "
            "via, or export in precision fp32"
        )

    try:
        torch_tensorrt = import_optional(
            "torch_tensorrt",
            "torch-tensorrt",
            ".[torch-tensorrt]",
            RuntimeUnavailableError,
        )
    except RuntimeError as error:  # it asks for the GPU when it is imported
        raise RuntimeUnavailableError(f"torch-tensorrt: {first_line(error)}") from error

    # torch-tensorrt has no converter for a stable sort, but one for `topk`, which differs for
    # ties only.
    stable_sort = torch.ops.aten.sort.stable
    program = read_program().run_decompositions(
        {
            stable_sort: lambda x, dim=-1, descending=False, **_: x.topk(
                x.shape[dim], dim, descending
            )
        }
    )

    _cast_program_images_first(program)

    # One profile: TensorRT tunes the engine for its largest batch.
    images = torch_tensorrt.Input(
        min_shape=(profile.minimum, *manifest.image_shape),
        opt_shape=(profile.maximum, *manifest.image_shape),
        max_shape=(profile.maximum, *manifest.image_shape),
        dtype=torch.uint8,
    )

    # The plan has the input and the outputs under their names in the bundle.
    names = [output.name for output in manifest.outputs]
    try:
        return bytes(
            torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
                program,
                arg_inputs=[images],
                arg_input_binding_names=(manifest.inputs[0].name,),
                output_binding_names=pytree.tree_unflatten(names, program.call_spec.out_spec),
                disable_tf32=True,
                require_full_compilation=True,
                min_block_size=1,
                workspace_size=workspace,
            )
        )
    except Exception as error:  # its errors have no common base class
        # The cause names the operator; the error itself shows the whole graph.
        cause = first_line(error.__cause__ or error)
        raise EngineError(
            f"{bundle.path}: torch-tensorrt cannot build the engine: {cause}"
        ) from error


def _cast_program_images_first(program: ExportedProgram) -> None:
    """Cast the uint8 images of *program* to float32 first, in place: TensorRT can only cast uint8."""
    graph = program.graph
    (name,) = program.graph_signature.user_inputs
    images = next(node for node in graph.nodes if node.name == name)
    with graph.inserting_after(images):
        cast = graph.call_function(
            torch.ops.aten._to_copy.default, (images,), {"dtype": torch.float32}
        )
    cast.meta["val"] = images.meta["val"].to(torch.float32)

    images.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    program.graph_module.recompile()
