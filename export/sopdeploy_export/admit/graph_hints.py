"""What the graph of a network tells of its author's intentions: its own normalization, and cosines as logits."""

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

# Operators that begin a normalization of the network itself
_SHIFTS_AND_SCALES = ("sub", "div", "mul", "add")
# Operators that may come before it, because they change no values, or only the size
_NO_CHANGE = {
    "permute", "contiguous", "clone", "to", "_to_copy", "index_select", "sum", "view", "reshape", "alias",
    "detach", "flip", "index", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d",
    "_upsample_bicubic2d_aa",
}  # fmt: skip
_OWN_LAYER = "normalise"  # of `Deployed`
# What `torch.nn.functional.normalize` and its like compute
_NORMS = ("linalg_vector_norm", "linalg_norm", "norm", "rsqrt")
_COSINE = 1.0001  # the largest absolute value of a cosine, with its rounding


def normalizes_itself(program: ExportedProgram) -> bool:
    """Tell whether the first operator of the network shifts or scales the channels of its images.

    *program* is that of `Deployed`, whose own layer comes first.
    """
    signature = program.graph_signature
    own = {
        name
        for name, target in signature.inputs_to_buffers.items()
        if target.startswith(f"{_OWN_LAYER}.")
    }
    node = next(node for node in program.graph.nodes if node.name in signature.user_inputs)

    # Checks of torch.export use a value, too, but nothing uses them.
    while len(users := [user for user in node.users if user.users]) == 1:
        (node,) = users
        operator = _name_of(node)
        is_own = any(isinstance(each, Node) and each.name in own for each in node.args)
        if is_own or operator in _NO_CHANGE:
            continue
        return operator in _SHIFTS_AND_SCALES and any(map(_is_per_channel, node.args[1:2]))
    return False


def returns_cosines(program: ExportedProgram, logits: Tensor) -> bool:
    """Tell whether *logits* (P, C) can be cosines: in -1 to 1, in a network that divides vectors by their norms."""
    has_norms = any(_name_of(node) in _NORMS for node in program.graph.nodes)
    return has_norms and logits.shape[1] > 1 and bool((logits.abs() <= _COSINE).all())


def _name_of(node: Node) -> str:
    """Return the name of the operator of *node*, such as "sub"; "" of an input or output."""
    if node.op != "call_function":
        return ""
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", "")))


def _is_per_channel(value: object) -> bool:
    """Tell whether *value* is a number, or a tensor with one number or with one for each of three channels."""
    if isinstance(value, int | float):
        return True
    tensor = value.meta.get("val") if isinstance(value, Node) else None
    if not isinstance(tensor, Tensor) or not all(
        isinstance(side, int) for side in tensor.shape
    ):
        return False  # a size that follows the batch
    return tensor.numel() in (1, 3)
