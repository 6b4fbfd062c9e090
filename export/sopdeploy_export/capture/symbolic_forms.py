"""Forms of operators that torch captures for every batch size."""

import inspect
from collections.abc import Sequence
from string import ascii_letters
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from sopdeploy_export.network import tensors, unstored_buffers

CDIST_ROWS = 25  # of ATen (Distance.cpp)
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
# Composite operators whose result is a new tensor.
RETURN_NEW = {
    getattr(torch.ops.aten, name).default
    for name in (
        "batch_norm",
        "conv1d",
        "conv2d",
        "conv3d",
        "group_norm",
        "layer_norm",
        "linear",
    )
}
TRACED = (FakeTensor, FunctionalTensor)
IN_PLACE = {
    f"aten.{name}_.default": name
    for name in ("hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "silu")
}


def simplify_operators(program: ExportedProgram) -> None:
    """Simplify activations, average pooling, `ceil_mode` without effect, and ellipses in `einsum`.

    *program* changes in place.

    - Adaptive average pooling to one position becomes a mean, as which ATen computes it. ATen also restores
      the strides of a map in channels-last layout with `as_strided`
      (AdaptiveAveragePooling.cpp). torch-tensorrt cannot convert this operator, and ONNX needs
      five operators for it.
    - An activation in place becomes the same activation out of place, if nothing else can read what
      it writes (`_out_of_place`). torch would do so in the functional program, but by fifteen
      operators with symbolic sizes, which takes half of the time of a MobileNet.
    """
    # Activations in place.
    aten = torch.ops.aten
    for node in program.graph.nodes:
        activation = _out_of_place(node)
        if activation is not None:
            node.target = activation

    # Average pooling over 1, 2 or 3 axes to one position is the mean of these axes, the last ones.
    poolings = (aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d)
    for num_axes, pooling in enumerate(poolings, start=1):
        for node in program.graph.find_nodes(op="call_function", target=pooling.default):
            x, output_size = node.args
            if output_size == [1] * num_axes:
                axes = [-1 - number for number in range(num_axes)]
                node.target = aten.mean.dim
                node.args = (x, axes, True)

    # With `ceil_mode`, ONNX counts windows that begin behind the map, ATen does not. `ceil_mode` is
    # left out where it has no effect.
    for node in program.graph.find_nodes(op="call_function", target=aten.max_pool2d.default):
        # The last argument is `ceil_mode`, by default False.
        if len(node.args) == 6 and node.args[5]:
            x, kernel, stride, padding, dilation, _ = node.args
            image = torch.empty(x.meta["val"].shape[1:], device="meta")  # (C, H, W)
            floored = aten.max_pool2d(image, kernel, stride, padding, dilation)
            if floored.shape[-2:] == node.meta["val"].shape[-2:]:
                node.args = (x, kernel, stride, padding, dilation)

    # ONNX Runtime does not accept every form of an ellipsis.
    for node in program.graph.find_nodes(op="call_function", target=aten.einsum.default):
        equation, operands = node.args
        if "..." in equation.partition("->")[0]:
            ranks = [operand.meta["val"].ndim for operand in operands]
            node.args = (_label_hidden_axes(equation, ranks), operands)

    program.graph_module.recompile()


def _out_of_place(node: fx.Node) -> OpOverload | None:
    """Return the operator that computes the in-place activation of *node* out of place.

    Returns None for another operator, for an operand of integers, and if something else reads the
    operand of *node* or can share its memory: then the write in place can have an effect there.
    """
    target = node.target
    if not isinstance(target, OpOverload) or str(target) not in IN_PLACE:
        return None
    operand, *others = node.all_input_nodes
    if others or len(operand.users) > 1 or not operand.meta["val"].is_floating_point():
        return None

    # The operand must be a new tensor, not a view. Some of torch's composite operators can return
    # their own operand, as `dropout` does, and do not say so.
    source = operand.target
    if not isinstance(source, OpOverload):
        return None
    if any(result.alias_info for result in source._schema.returns):
        return None
    if source not in RETURN_NEW and source.has_kernel_for_dispatch_key(COMPOSITE):
        return None

    activation: OpOverload = getattr(torch.ops.aten, IN_PLACE[str(target)]).default
    return activation


def _label_hidden_axes(equation: str, ranks: Sequence[int]) -> str:
    """Replace every "..." by labels: for *ranks* 4 and 3, "...ij,...jk" becomes "baij,ajk->baik"."""
    terms, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:  # then the result has the labels that occur once, in alphabetical order
        labels_once = [x for x in set(terms) - set(",.") if terms.count(x) == 1]
        result = "..." + "".join(sorted(labels_once))

    # Operands are aligned at their last hidden axes, which therefore have the first unused letter.
    unused = [letter for letter in ascii_letters if letter not in terms]
    labeled_terms = []
    longest = ""
    for term, rank in zip(terms.split(","), ranks, strict=True):
        num_hidden = rank - len(term.replace("...", ""))
        labels = "".join(reversed(unused[:num_hidden]))
        labeled_terms.append(term.replace("...", labels))
        longest = max(longest, labels, key=len)

    # An ellipsis in the result stands for all hidden axes.
    return f"{','.join(labeled_terms)}->{result.replace('...', longest)}"


class PythonNumbers:
    """Tensors that code makes of Python numbers, such as a deviation per channel, and comparisons of them.

    They are the same for all images, so code may read them, as `normalize` of torchvision does.
    Another call on one of them can write to its memory or share it. After such a call, none of the
    tensors that were made before it is known any more. The parameters and buffers of *network*,
    which is captured, are the same for all images, too, such as a flag that says whether a layer is
    initialized: no network may write to those that a state dict stores.
    """

    MAKERS = (torch.tensor, torch.as_tensor)
    FUNCTIONS = frozenset({
        "__bool__", "__eq__", "__float__", "__ge__", "__gt__", "__int__", "__le__", "__lt__", "__ne__", "all",
        "any", "eq", "ge", "gt", "item", "le", "lt", "ne",
    })  # fmt: skip

    def __init__(self, network: nn.Module | None) -> None:
        # The values of known tensors, which themselves have none while torch.export runs.
        self._values = WeakIdKeyDictionary()
        self._names = WeakIdKeyDictionary()  # of those among them that the network stores
        self.read_names: set[str] = set()  # of stored tensors whose values code has read
        self._network = network
        self._stored: dict[str, Tensor] = {}
        if network is not None:
            unstored = unstored_buffers(network)
            self._stored = {
                name: tensor.detach()
                for name, tensor in tensors(network).items()
                if name not in unstored
            }

    def compute(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Compute a call of `FUNCTIONS` on known tensors, or of `MAKERS` on Python numbers.

        Returns a Python number, or a tensor: the value that the caller passes to `remember`
        with its own result of the call. Returns None for any other call; if one of its operands
        is known, the call can change it, so all tensors become unknown.
        """
        is_function = getattr(function, "__name__", "") in self.FUNCTIONS
        if (
            not len(self._values) and not is_function and function not in self.MAKERS
        ):  # most calls
            return None

        # Whether the call is one of the two kinds.
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if is_function:
            self._remember_stored(operands)
        are_known = [operand in self._values for operand in operands]
        if operands:
            computes = all(are_known) and is_function
        else:  # of Python numbers, not of an array, whose memory the tensor can share
            numbers = tree_leaves(args[:1])
            are_numbers = bool(numbers) and all(
                isinstance(number, int | float) for number in numbers
            )
            computes = function in self.MAKERS and are_numbers

        if not computes:
            if any(are_known):
                self._values = WeakIdKeyDictionary()
            return None

        self.read_names.update(
            self._names[operand] for operand in operands if operand in self._names
        )

        # Make the same call on the values; torch.export does not see this call.
        args, kwargs = tree_map_only(Tensor, self._values.__getitem__, (args, kwargs))
        with _disable_current_modes():
            return function(*args, **kwargs)

    def _remember_stored(self, operands: Sequence[Tensor]) -> None:
        """Note the values of those *operands* that the network stores; it has others while it is captured."""
        if self._network is None:
            return
        names_by_id = {id(tensor): name for name, tensor in tensors(self._network).items()}
        for operand in operands:
            name = names_by_id.get(id(operand))
            if name is not None and name in self._stored:
                self._values[operand] = self._stored[name]
                self._names[operand] = name

    def remember(self, result: Any, value: Tensor) -> None:
        """Note that *result* is a known tensor with *value*, which `compute` returned for its call."""
        self._values[result] = value


class SymbolicForms(TorchFunctionMode):
    """Replaces functions that torch.export captures for one batch size only, or not at all.

    These are `chunk` and `split` of the batch, as after `cat([x, x.flip(3)])`, `take_along_dim`,
    `cdist` and `contiguous`. Instance norm with running statistics becomes a batch norm; torch would make
    one image of the whole batch for it. Code that reads tensors of Python numbers gets their
    values, and so does code that reads parameters or buffers of the captured *network*.

    `unregistered` is a trainable tensor that code used and no module of *network* registers; else None.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self._numbers = PythonNumbers(network)
        stored = {} if network is None else tensors(network)
        self._registered = {_memory(tensor) for tensor in stored.values()}
        self.unregistered: Tensor | None = None

    @property
    def read_names(self) -> frozenset[str]:
        """The names of parameters and buffers of the network whose values code has read."""
        return frozenset(self._numbers.read_names)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the other form of *function*, if there is one.

        A Python value that is read from a tensor of Python numbers is returned without a call.
        """
        del types
        kwargs = kwargs or {}
        self._look_for_trained(args, kwargs)

        # The result is a number, which the network's code reads; a tensor; or not known (None).
        # This also forgets the known tensors if the call may change one of them.
        value = self._numbers.compute(function, args, kwargs)
        if value is not None and not isinstance(value, Tensor):
            return value

        result = OTHER_FORMS.get(function, function)(*args, **kwargs)
        if value is not None:
            self._numbers.remember(result, value)
        return result

    def _look_for_trained(self, args: Any, kwargs: Any) -> None:
        """Set `unregistered` if an operand of a call is a trainable tensor outside of the registered memory."""
        # `requires_grad` of a tensor is such a call itself.
        with torch._C.DisableTorchFunction():
            for operand in tree_leaves((args, kwargs)):
                # torch.export replaces registered tensors and results by tensors of its own types.
                is_real = isinstance(operand, Tensor) and not isinstance(operand, TRACED)
                if (
                    is_real
                    and operand.requires_grad
                    and operand.is_leaf
                    and _memory(operand) not in self._registered
                ):
                    self.unregistered = operand


def _memory(tensor: Tensor) -> int:
    """Return where the storage of *tensor* begins, which a view shares with its base."""
    return tensor.untyped_storage().data_ptr()


def _chunk(input: Tensor, chunks: int, dim: int = 0) -> Any:
    """Divide the batch axis into *chunks* of equal size by a view; leave other axes to torch."""
    if is_batch_axis(input, dim) and input.shape[0] % chunks == 0:
        return input.view(chunks, -1, *input.shape[1:]).unbind(0)
    return input.chunk(chunks, dim)


def _split(x: Tensor, size: Any, dim: int = 0) -> Any:
    """Divide the batch axis into parts of *size* images by a view; leave other axes and sizes to torch."""
    if is_batch_axis(x, dim) and not isinstance(size, list | tuple) and x.shape[0] % size == 0:
        return x.view(-1, size, *x.shape[1:]).unbind(0)
    return torch.split(x, size, dim)


def is_batch_axis(x: Tensor, dim: int) -> bool:
    """Return whether *dim* is the first axis of *x*, and *x* no weight."""
    return dim in (0, -x.ndim) and not isinstance(x, nn.Parameter)


def _contiguous(
    input: Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Call the operator, also for a contiguous operand, which torch returns without recording a call.

    That of a single image can have another layout than those of the capture.
    """
    result: Tensor = torch.ops.aten.contiguous.default(input, memory_format=memory_format)
    return result


def _take_along(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """Compute `take_along_dim` by `gather`, after all axes but *dim* are expanded to common sizes."""
    if dim is None:  # both are flattened
        return torch.take_along_dim(input, indices)

    # The axis is the last one: (..., n) of the operand, (..., k) of the indices.
    x = input.movedim(dim, -1)
    chosen = indices.movedim(dim, -1)
    shape = torch.broadcast_shapes(x.shape[:-1], chosen.shape[:-1])  # type: ignore[no-untyped-call]
    x = x.expand(*shape, x.shape[-1])
    chosen = chosen.expand(*shape, chosen.shape[-1])
    return x.gather(-1, chosen).movedim(-1, dim)


def _instance_norm(*args: Any, **options: Any) -> Tensor:
    """Compute an instance norm with running statistics as a batch norm; leave another one to torch."""
    named = inspect.signature(F.instance_norm).bind(*args, **options).arguments
    if named.pop("use_input_stats", True):
        return F.instance_norm(*args, **options)
    return F.batch_norm(**named)


def _cdist(
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor:
    """Compute distances (..., P, R) of P and R vectors from their differences.

    torch multiplies matrices instead if P or R is above 25, and needs the batch size as a number for
    this choice. Here, only a size that is not a batch decides. Neither does if *compute_mode* says what to do.
    """
    multiplies = compute_mode == "use_mm_for_euclid_dist"
    if compute_mode == "use_mm_for_euclid_dist_if_necessary":
        multiplies = any(
            isinstance(x.shape[-2], int) and x.shape[-2] > CDIST_ROWS for x in (x1, x2)
        )
    if p == 2 and multiplies:
        return torch.cdist(x1, x2, p, "use_mm_for_euclid_dist")
    differences = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    return torch.linalg.vector_norm(differences, ord=p, dim=-1)


# Parameters have torch's names, by which calls can give them. torch itself gives those of `split` by
# position, except `dim`.
OTHER_FORMS: dict[Any, Any] = {
    **dict.fromkeys((torch.chunk, Tensor.chunk), _chunk),
    **dict.fromkeys((torch.split, Tensor.split), _split),
    **dict.fromkeys((torch.take_along_dim, Tensor.take_along_dim), _take_along),
    F.instance_norm: _instance_norm,
    torch.cdist: _cdist,
    Tensor.contiguous: _contiguous,
}
