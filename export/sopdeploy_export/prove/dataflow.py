"""The dataflow of one run: which operators made each tensor, from which operands.

A tensor is known by a hash of the operator that made it and of what this operator's operands are
known by, down to the image and the stored tensors of the network. Two runs whose results are
known by the same hash computed them in the same way, for images and weights of any values.

- The image is known as `image`, a stored tensor by its name.
- Everything that depends on neither is a constant, known by its content, however it was computed:
  `torch.arange` in forward, or a table in the graph.
- A view is known by its memory, shape, strides and offset; a write gives the memory a new maker.
"""

import contextlib
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sopdeploy.errors import first_line
from sopdeploy_export.network import is_network_code, modules
from sopdeploy_export.program_hashes import are_equal, draws, module_names
from sopdeploy_export.prove.tensors import Layout, address, is_plain, layout_of, tensors_in

_COMPOSITE = "CompositeImplicitAutograd"
_ALLOCATORS = ("empty", "new_empty")  # operators whose results have no content yet
# What the image, and the results of allocators, are known by.
_IMAGE = "image"
_UNFILLED = "unfilled"


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator that ran; what its operands are known by, the module and the line of its call."""

    name: str
    operands: tuple[str, ...]
    module: str
    line: str
    is_random: bool

    def __str__(self) -> str:
        return f"{self.name} {self.place}"

    @property
    def place(self) -> str:
        """The module and the line of the call."""
        return f"in {self.module or 'the network'} ({self.line})"


@dataclass(frozen=True, slots=True)
class BuiltinCall:
    """A call of a built-in function of torch: the memory of its arguments; the reads of its own results."""

    arguments: frozenset[int]
    reads: list[str]


class UnknownOperatorError(Exception):
    """An operator whose results have no known layout."""


@dataclass(slots=True)
class Remains:
    """What earlier runs left in memory, by the `address` of this memory.

    Attributes:
        made_by: What the memory is known by.
        of_image: The memory whose content depends on an image.
        alive: References to the memory, which keep its addresses from being used again.
    """

    made_by: dict[int, str] = field(default_factory=dict)
    of_image: set[int] = field(default_factory=set)
    alive: dict[int, Any] = field(default_factory=dict)


class Dataflow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the dataflow of the run in its block.

    Attributes:
        operators: The operators that ran, in their order, each by a hash of it and its arguments.
        reads: Where values of the image, or sizes that depend on them, reached Python.
        hidden_writes: Operators that write to an operand, although their schemas say they do not.
        kept_writes: Operators that write to stored tensors, or what depends on the image to other
            memory from before the run.
        reused: Operators that use what an earlier run made of its image.
        failures: Calls that cannot be recorded; the network's code may go on after the error.
        layouts: The layouts of new results that depend on the image, by the hashes of `operators`.
    """

    supports_higher_order_operators = True  # else they fail in the mode, and only there

    def __init__(
        self,
        network: nn.Module,
        stored: Mapping[str, Tensor],
        image: Tensor,
        remains: Remains,
        known_layouts: Mapping[str, Sequence[Layout]] | None = None,
    ) -> None:
        """Record a run on *image* of a *network* with *stored* tensors, after runs that left *remains*.

        *known_layouts* are the `layouts` of another run. With them, operators on what depends on the
        image are not computed (`_imitate`), and one that the other run lacks raises
        `UnknownOperatorError`.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: dict[str, Operator] = {}
        self.reads: list[str] = []
        self.hidden_writes: list[str] = []
        self.kept_writes: list[str] = []
        self.reused: list[str] = []
        self.failures: list[str] = []
        self.layouts: dict[str, list[Layout]] = {}
        self._known_layouts = known_layouts
        self.node: fx.Node | None = None  # the node that runs, if a graph does

        # The call of a function of torch that runs, if the function is built-in.
        self.call: BuiltinCall | None = None

        # The names of modules by their ids.
        self._names = {id(module): name for name, module in modules(network)}

        # What memory is known by before the run. Of several names of a stored tensor, the first
        # counts: in reversed order, it overwrites the others.
        self._remains = remains
        self._made_by = dict(remains.made_by)
        self._made_by |= {address(tensor): name for name, tensor in reversed([*stored.items()])}
        self._made_by[address(image)] = _IMAGE
        self._stored = {address(tensor) for tensor in stored.values()}

        # The memory of the run, each set by address. Memory that is freed can be that of another
        # tensor later, so `_memory` has a weak reference to each.
        self._of_image = {address(image)}  # whose content depends on the image
        self._born = {address(image)}  # the image, and what was allocated during the run
        self._made = {address(image)}  # the image, and what operators returned
        self._memory: dict[int, Any] = {}
        self._refer_to(image)
        self._read_only: set[int] = set()  # operands of the user's own operator that runs

        # What constants are known by: by memory, then by the place of the tensor in it.
        self._contents: dict[int, dict[str, str]] = {}

    def known_by(self, tensor: Tensor) -> str:
        """Return what *tensor* is known by, with its place in its memory.

        The hash of a constant is kept until something writes to its memory.
        """
        memory = self._address(tensor)
        place = (
            f"{tuple(tensor.shape)} {tensor.stride()} {tensor.storage_offset()} {tensor.dtype}"
        )
        if memory in self._made_by:
            return f"{self._made_by[memory]} {place}"

        # A constant, known by its content.
        contents = self._contents.setdefault(memory, {})
        if place not in contents:
            plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
            digest = hashlib.sha1(
                plain.view(torch.uint8).numpy().tobytes(), usedforsecurity=False
            )
            kind = f"{tuple(tensor.shape)} {tensor.dtype}"
            contents[place] = f"constant {digest.hexdigest()} {kind}"
            self._refer_to(tensor)
        return contents[place]

    def depends_on_image(self, values: Any) -> bool:
        """Return whether a tensor in *values* was computed from the image."""
        return any(
            not tensor.is_meta and self._address(tensor) in self._of_image
            for tensor in tensors_in(values)
        )

    def behind(self, result: str) -> dict[str, Operator]:
        """Return the operators, by hash, that compute *result*, in the order of the run.

        *result* is what `known_by` returns for a tensor.
        """
        # What an operator made is known by "HASH#POSITION PLACE"; `operands` lack the place.
        # The image, stored tensors and constants have no operator.
        needed: set[str] = set()
        unvisited = [result.partition(" ")[0]]
        while unvisited:
            operator_hash = unvisited.pop().partition("#")[0]
            if operator_hash in self.operators and operator_hash not in needed:
                needed.add(operator_hash)
                unvisited += self.operators[operator_hash].operands
        return {
            operator_hash: operator
            for operator_hash, operator in self.operators.items()
            if operator_hash in needed
        }

    def is_made(self, tensor: Tensor) -> bool:
        """Return whether the memory of *tensor* is stored in the network, or an operator made it."""
        memory = self._address(tensor)
        return memory in self._made or memory in self._stored

    def _refer_to(self, tensor: Tensor) -> None:
        """Keep a weak reference to the memory of *tensor*, which shows when it is freed."""
        reference: Any = StorageWeakRef
        self._memory[address(tensor)] = reference(tensor.untyped_storage())

    def _address(self, tensor: Tensor) -> int:
        """Return the `address` of *tensor*; forget what was known of it if that memory was freed before."""
        memory = address(tensor)
        reference = self._memory.get(memory)
        if reference is not None and reference.expired():
            del self._memory[memory]
            self._made_by.pop(memory, None)
            for memories in (self._of_image, self._born, self._made):
                memories.discard(memory)
            self._contents.pop(memory, None)
        return memory

    @contextlib.contextmanager
    def recording(self, function: Any) -> Iterator[None]:
        """Let the caller record a call of *function* in the block, and note in `failures` if this fails.

        The error is raised again, but the network's code may catch it and do something else. In the
        block, `FunctionReads` sees no calls: what the record asks of tensors is not what the
        network's code does.
        """
        try:
            with torch._C.DisableTorchFunction():
                yield
        except Exception as error:  # which the network's own `except` would hide
            name = getattr(function, "__name__", str(function))
            self.failures.append(f"{name} {self.place()}: {first_line(error)}")
            raise

    def place(self) -> str:
        """Return the module and the line of the code that runs."""
        module, line = self._locate()
        return f"in {module or 'the network'} ({line})"

    def leave(self) -> None:
        """Note in the `Remains` the memory of the run that something still holds, but for stored tensors.

        Constants, and the image of the run, are known by their content afterwards.
        """
        for memory, reference in self._memory.items():
            if reference.expired() or memory in self._stored:
                continue

            # A reference that is not weak: from now on, nothing frees this memory.
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            self._remains.alive[memory] = storage

            maker = self._made_by.get(memory)  # None of a constant
            if maker is not None and maker != _IMAGE:
                self._remains.made_by[memory] = maker
            if memory in self._of_image:
                self._remains.of_image.add(memory)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operator, and record it; of an operator that runs others, record these.

        With the layouts of another run, one that depends on the image is imitated instead of run.
        """
        del types
        kwargs = kwargs or {}

        # Operators that run others are not recorded themselves.
        if isinstance(func, HigherOrderOperator):  # such as `cond`: values choose the code
            if self.depends_on_image((args, kwargs)):
                self.reads.append(f"{func} {self.place()}")
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE):
            with self:  # in inference mode alone, composite operators arrive undivided
                return func.decompose(*args, **kwargs)

        # Describe the operator and its operands before it runs: it may write to them.
        with self.recording(func):
            operands = tensors_in((args, kwargs))
            of_image = self.depends_on_image(operands)
            is_random = draws(func, args, kwargs)
            # The image, stored tensors and what was computed from them have a maker.
            has_maker = any(self._address(operand) in self._made_by for operand in operands)
            is_constant = not has_maker and not is_random
            text = f"{func} {self._describe(args)} {self._describe(kwargs)}"
            operator_hash = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
            operator = Operator(
                str(func),
                tuple(self.known_by(operand).partition(" ")[0] for operand in operands),
                *self._locate(),
                is_random=is_random,
            )

        # `FunctionReads` must not see this call. Compiled code, such as TorchScript's, hides its own
        # call from it, so it would take this one for a call of the network's code.
        with torch._C.DisableTorchFunction():
            if self._known_layouts is None or not of_image:
                result = self._run(func, operands, operator, args, kwargs)
            else:
                result = self._imitate(func, operator_hash, args, kwargs)

        # Record it, and what it reads and writes. Of two runs of an operator on the same operands,
        # which have the same hash, the first one is kept.
        with self.recording(func):
            # Memory that an earlier run has filled, and this one has not.
            if any(
                address(operand) in self._remains.of_image
                and address(operand) not in self._of_image
                for operand in operands
            ):
                self.reused.append(str(operator))
            if self._hands_out_values(func, args, operands):
                self._reads_of(func, operands).append(str(operator))
            self.operators.setdefault(operator_hash, operator)

            self._note_writes(
                func, args, kwargs, operator, operator_hash, of_image, is_constant
            )
            self._note_results(func, result, operands, operator_hash, of_image, is_constant)
        return result

    def _reads_of(self, func: Any, operands: Sequence[Tensor]) -> list[str]:
        """Return the list to which a read by *func* is added.

        It is that of the built-in function that runs, if this reads what it has made itself,
        and `reads` otherwise: also if values decide the size of a result.
        """
        has_size_from_values = torch.Tag.dynamic_output_shape in func.tags
        if self.call is None or has_size_from_values:
            return self.reads
        is_argument = not self.call.arguments.isdisjoint(map(address, operands))
        return self.reads if is_argument else self.call.reads

    def _run(
        self, func: Any, operands: Sequence[Tensor], operator: Operator, args: Any, kwargs: Any
    ) -> Any:
        """Run *func*; note it in `hidden_writes` if it changes an operand although its schema does not say so.

        Only operators of the user are checked, whose schemas declare no write at all.
        """
        is_of_torch = func.namespace in ("aten", "prim", "prims")
        if is_of_torch or func._schema.is_mutable:
            return func(*args, **kwargs)

        # Find writes in two ways. While it runs, `_note_writes` notes each operator of its
        # kernel that writes to an operand, although nothing prevents the write. The copies show
        # a write that no operator makes, such as one by way of NumPy.
        copies = [operand.clone() for operand in operands]
        outer = self._read_only
        self._read_only = {address(operand) for operand in operands}
        try:
            # `with self` records the operators that a kernel in Python runs. The key calls the
            # kernel for CPUs itself: a plain call would come back to this mode.
            with self:
                keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                result = func.redispatch(keys, *args, **kwargs)
        finally:
            self._read_only = outer
        if not all(map(are_equal, operands, copies)):
            self.hidden_writes.append(str(operator))
        return result

    def _imitate(self, func: Any, operator_hash: str, args: Any, kwargs: Any) -> Any:
        """Return results as *func* does, but new tensors without content, in the layouts known for *operator_hash*.

        An operator that writes to one operand and returns it does not run; this operand is the
        result. Views, checks and other operators that write do run. Raises `UnknownOperatorError` if
        the layouts of new tensors are not known.
        """
        # An operator that writes to one operand, and returns it.
        returned = [value.alias_info for value in func._schema.returns]
        changes_shape = torch.Tag.inplace_view in func.tags
        if func._schema.is_mutable and not changes_shape:
            values = _by_name(func, args, kwargs)
            written = [
                argument.name for argument in func._schema.arguments if argument.is_write
            ]
            if len(written) == len(returned) == 1:
                return values[written[0]]

        # Other operators that write, and those that make no new tensor, views and checks, do run.
        if func._schema.is_mutable or None not in returned:
            return func(*args, **kwargs)

        # New tensors.
        if self._known_layouts is None or operator_hash not in self._known_layouts:
            raise UnknownOperatorError(str(func))
        results = [layout.empty() for layout in self._known_layouts[operator_hash]]
        types = [value.type for value in func._schema.returns]
        are_tensors = all(isinstance(each, torch.TensorType) for each in types)
        if not are_tensors or len(types) != len(results):
            raise UnknownOperatorError(str(func))
        return results[0] if len(results) == 1 else tuple(results)

    def _note_writes(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        operator: Operator,
        operator_hash: str,
        of_image: bool,
        is_constant: bool,
    ) -> None:
        """Give the memory that an operator wrote to a new maker, and note writes that are faults.

        These are writes to an operand that is read-only, to a stored tensor of the network and,
        if what is written depends on the image, to memory from before the run.
        """
        values = _by_name(func, args, kwargs)
        names = [argument.name for argument in func._schema.arguments if argument.is_write]

        for tensor in tree_leaves([values.get(name) for name in names]):
            if not isinstance(tensor, Tensor):
                continue

            memory = self._address(tensor)
            if memory in self._read_only:
                self.hidden_writes.append(str(operator))
            if memory in self._stored or (of_image and memory not in self._born):
                self.kept_writes.append(str(operator))
            self._note(tensor, operator_hash, of_image, is_constant)

    def _note_results(
        self,
        func: Any,
        result: Any,
        operands: Sequence[Tensor],
        operator_hash: str,
        of_image: bool,
        is_constant: bool,
    ) -> None:
        """Give the memory of each new result a maker, and note that the run allocated it.

        A view has the maker of its memory already. The layouts of new results that depend on the
        image are noted in `layouts`.
        """
        returns_view = any(value.alias_info is not None for value in func._schema.returns)
        is_unfilled = func._schema.name.partition("::")[2].startswith(_ALLOCATORS)
        memories = {address(operand) for operand in operands}

        # The layouts of new results, with which `_imitate` need not compute them.
        results = tensors_in(result)
        if of_image and not returns_view and all(map(is_plain, results)):
            self.layouts.setdefault(operator_hash, [layout_of(tensor) for tensor in results])

        for position, tensor in enumerate(tree_leaves(result)):
            if not isinstance(tensor, Tensor):
                continue

            # A view of an operand. `torch.tensor` in forward calls `lift_fresh` on what it allocates.
            memory = self._address(tensor)
            if returns_view and memory in memories:
                if "lift_fresh" in str(func):
                    self._born.add(memory)
                continue

            # New memory.
            self._born.add(memory)
            self._made.add(memory)
            maker = f"{operator_hash}#{position}"
            if is_unfilled:
                maker = _UNFILLED
            self._note(tensor, maker, of_image, is_constant and not is_unfilled)

    def _note(self, tensor: Tensor, maker: str, of_image: bool, is_constant: bool) -> None:
        """Note that *maker* wrote to the memory of *tensor*; a constant is known by its content instead."""
        memory = self._address(tensor)
        self._refer_to(tensor)
        if is_constant:  # forget its hash: the content may be new
            self._contents.pop(memory, None)
            self._made_by.pop(memory, None)
            return
        self._made_by[memory] = maker
        if of_image:
            self._of_image.add(memory)

    def _describe(self, value: Any) -> str:
        """Describe *value*, an argument, with its nesting, because `[None, i]` is not `[i, None]`."""
        if isinstance(value, Tensor):
            return self.known_by(value)
        if isinstance(value, list | tuple):
            return "[" + ",".join(map(self._describe, value)) + "]"
        if isinstance(value, Mapping):
            items = [f"{name}={self._describe(item)}" for name, item in value.items()]
            return "{" + ",".join(items) + "}"
        return repr(value)

    def _hands_out_values(self, func: Any, args: Any, operands: Sequence[Tensor]) -> bool:
        """Return whether *func* gives Python a value of the image, or a size that depends on its values."""
        if not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags}:
            return False
        if func is torch.ops.aten.index.Tensor:  # the size depends on masks, not on indices
            masks = (torch.bool, torch.uint8)
            indices = [index for index in args[1] if isinstance(index, Tensor)]
            operands = [index for index in indices if index.dtype in masks]
        return self.depends_on_image(list(operands))

    def _locate(self) -> tuple[str, str]:
        """Return the innermost module whose forward runs, and the innermost line of code of the network.

        For a layer of torch, this is the line that calls the layer. If a graph runs, both are those
        that its node was captured from.
        """
        if self.node is not None:
            return _locate_node(self.node)
        module: str | None = None
        line = ""
        frame: FrameType | None = sys._getframe(2)  # behind this method and its caller
        while frame is not None and (module is None or not line):
            file = frame.f_code.co_filename
            if not line and is_network_code(file):
                line = f"{Path(file).name}:{frame.f_lineno}"
            if module is None and frame.f_code.co_name == "forward":
                module = self._names.get(id(frame.f_locals.get("self")))
            frame = frame.f_back
        return (module or "").removeprefix("network").removeprefix("."), line


class GraphRun(fx.Interpreter):
    """Runs a captured graph with *stored* tensors of a network.

    If `flow` is set, it is told which node runs.
    """

    def __init__(self, graph: fx.GraphModule, stored: Mapping[str, Tensor]) -> None:
        super().__init__(graph)
        self._stored = stored
        self.flow: Dataflow | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run the node *n*."""
        if self.flow is not None:
            self.flow.node = n
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return the stored tensor *target* of the network, or a constant of the graph."""
        if target in self._stored:
            return self._stored[target]
        return super().get_attr(target, args, kwargs)


def _by_name(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call of *func* by their names; those that are left out are missing."""
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _locate_node(node: fx.Node) -> tuple[str, str]:
    """Return the innermost module and the line of the code that *node* was captured from."""
    names = module_names(node)
    module = names[-1] if names else ""

    # The last line of the trace that is in code of the network: `File "net.py", line 3, in forward`.
    text = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("File ")]
    of_network = [line for line in lines if is_network_code(line.split('"')[1])]
    last = (of_network or lines or ['File "?", line ?,'])[-1]
    number = last.rpartition("line ")[2].partition(",")[0]
    file = Path(last.split('"')[1]).name
    return module, f"{file}:{number}"
