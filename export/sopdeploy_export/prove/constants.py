"""Constants: tensors of a graph that no module registers, so that no weight file has them."""

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec

from sopdeploy.errors import LoweringError
from sopdeploy_export.capture.program import NETWORK_PREFIX
from sopdeploy_export.program_hashes import are_equal

# The most numbers of an accepted tensor that is not a parameter or buffer, such as a mean and a
# deviation.
MAX_CONSTANT = 16


def check_constants(
    program: ExportedProgram, rebuild: Callable[[], ExportedProgram] | None = None
) -> None:
    """Raise `LoweringError` if *program* contains a large tensor that its network does not register.

    Such a tensor may be trained, and is in no weight file. It is accepted if it is a view of a
    parameter or buffer, or if code makes it: then the program that *rebuild* returns, of a network
    that a builder made anew, has an equal tensor in memory of its own. What both programs share, such
    as a global variable, is not accepted.
    """
    constants = _large_constants(program)
    if not constants:
        return

    # The memory of parameters and buffers. A view of one is not refused.
    registered_memory = _storage_addresses(
        program.state_dict.get(spec.target or "", program.constants.get(spec.target or ""))
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
    )

    # Refuse a constant unless it is such a view, or code made it.
    rebuilt = [] if rebuild is None else [tensor for _, tensor in _large_constants(rebuild())]
    rebuilt_memory = _storage_addresses(rebuilt)
    for spec, constant in constants:
        memory = constant.untyped_storage().data_ptr()
        is_made = memory not in rebuilt_memory and any(
            are_equal(constant, tensor) for tensor in rebuilt
        )

        if memory not in registered_memory and not is_made:
            has_name = "lifted_tensor" not in str(spec.target)  # torch's name for those without
            name = str(spec.target).removeprefix(NETWORK_PREFIX) if has_name else "a tensor"
            raise LoweringError(
                f"the output depends on {name} of shape {tuple(constant.shape)}, which is not a parameter or "
                "buffer, so no weight file contains it; use ModuleList, ModuleDict or register_buffer",
                remedies={"allow_constants": True},
            )


def _storage_addresses(tensors: Iterable[Tensor | None]) -> set[int]:
    """Return where the storages of *tensors*, without None, begin; a view has the storage of its base."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor is not None}


def constants_in_use(program: ExportedProgram) -> Iterator[tuple[InputSpec, Tensor]]:
    """Yield the tensors that operations of *program* read and no module registers."""
    users = {node.name: node.users for node in program.graph.nodes if node.op == "placeholder"}

    for spec in program.graph_signature.input_specs:
        constant = program.constants.get(spec.target or "")
        if spec.kind != InputKind.CONSTANT_TENSOR or not isinstance(constant, Tensor):
            continue
        if users[spec.arg.name]:
            yield spec, constant


def _large_constants(program: ExportedProgram) -> list[tuple[InputSpec, Tensor]]:
    """List those of `constants_in_use` that have more than `MAX_CONSTANT` numbers."""
    return [
        (spec, constant)
        for spec, constant in constants_in_use(program)
        if constant.numel() > MAX_CONSTANT
    ]
