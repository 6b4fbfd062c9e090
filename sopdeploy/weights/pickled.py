"""Pickles of data, read in linear time: what they would cost is counted before, and what they hold after.

A pickle can name one object any number of times. Forty lists that hold the next one twice are
2^40 values for all that walks them, and a tuple is hashed through all its paths if it is a key.
"""

import math
import pickletools
import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_VALUES = 10_000_000  # of lists, tuples and dicts, each counted wherever it is named
MAX_LEVELS = 100
_MAX_PICKLES = 5  # of a file of PyTorch before 1.6
# The first ones allocate as many bytes as a number says, the codecs take quadratic time.
_COSTLY = {
    "builtins bytearray", "__builtin__ bytearray", "torch.storage UntypedStorage",
    "torch.storage TypedStorage", "idna", "punycode",
}  # fmt: skip
_NUMBERS = re.compile(r"b1|[iu][1248]|f[248]|c(8|16)")  # the dtypes of numpy that torch has


class _Extent(NamedTuple):
    """The number of values of an object, each counted wherever it is named, and its levels."""

    values: int
    levels: int


class StoredKind:
    """What a pickle says of a dtype of numpy, such as "f8"; `order` is "<", ">" or "|"."""

    def __init__(self, text: Any = None, *_: Any) -> None:
        self.text = text
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        """Read the order of bytes; the other entries are those of fields and of dates."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]

    def read(self, raw: Any, shape: Any, *, by_columns: bool = False) -> NDArray[Any] | None:
        """Read an array of *shape* from its bytes *raw*; None if it does not contain numbers.

        With *by_columns*, the bytes are in the order of Fortran: the first index varies fastest.
        Raises `ValueError` if an array of *shape* needs more or fewer bytes.
        """
        if not isinstance(raw, bytes) or not isinstance(self.text, str):
            return None
        if not _NUMBERS.fullmatch(self.text):
            return None

        dtype = np.dtype(self.order + self.text)
        has_size = isinstance(shape, tuple) and (
            math.prod(map(int, shape)) * dtype.itemsize == len(raw)
        )
        if not has_size:
            raise ValueError("an array has another size than its numbers")

        values = np.frombuffer(raw, dtype).reshape(shape, order="F" if by_columns else "C")
        return values.astype(dtype.newbyteorder("="), order="C")


class StoredArray:
    """An array of numpy in a pickle; `values` is None if it does not contain numbers."""

    def __init__(self, *_: Any) -> None:
        self.values: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        """Set `values` from version, shape, kind, order of axes and bytes, if the kind is one of numbers."""
        _, shape, kind, by_columns, raw = state
        if isinstance(kind, StoredKind):
            self.values = kind.read(raw, shape, by_columns=bool(by_columns))


def _read_scalar(kind: Any, raw: Any = None) -> Any:
    """Read a scalar of numpy as a number of Python; None if it is not a number."""
    values = kind.read(raw, ()) if isinstance(kind, StoredKind) else None
    return None if values is None else values.item()


# What stands for the plain types that checkpoints contain beside tensors. None of them
# allocates more than the pickle has, or calls what the pickle names.
PLAIN_TYPES: list[tuple[Callable[..., Any], str]] = [
    (Namespace, "argparse.Namespace"),
    *((_read_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((StoredArray, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (StoredArray, "numpy.ndarray"),
    (StoredKind, "numpy.dtype"),
    *(
        (lambda *parts: "/".join(map(str, parts)), f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ),
    (lambda *_: {}, "collections.defaultdict"),
    # The type of its missing values, which is not used:
    *(
        (lambda *_: None, f"builtins.{name}")
        for name in ("list", "dict", "int", "float", "str", "bool", "tuple")
    ),
]


def check_pickles(file: IO[bytes]) -> None:
    """Raise `ValueError` if reading a pickle at the start of *file* may cost too much."""
    cost = 0
    for _ in range(_MAX_PICKLES):
        cost += _count_hashed_values(file, cost)
        if not file.read(1):  # the end of the file
            return
        file.seek(-1, 1)


def _count_hashed_values(file: IO[bytes], cost: int) -> int:
    """Count the values that Python would hash to read the next pickle of *file*.

    It reads no value, but follows the operations with the extent of each value in its place;
    only tuples are hashed by content. *cost* is that of the pickles before.
    """
    # The stack of the machine that reads pickles, with sizes in place of values.
    stack: list[_Extent | None] = []  # None is a mark
    memo: dict[Any, _Extent | None] = {}
    hashed = 0

    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if argument in _COSTLY:
            raise ValueError(f"{argument}: may take any time or memory")

        # Values that are named again keep their extent.
        if name in {"BINPUT", "LONG_BINPUT"}:
            memo[argument] = stack[-1]
            continue
        if name in {"BINGET", "LONG_BINGET"}:
            stack.append(memo[argument])
            continue
        if name == "MARK":
            stack.append(None)
            continue

        # A tuple has all values of what it takes; other results count as one. Keys, with the
        # values beside them, and the arguments of a call count as hashed.
        operands = _take_operands(operation, stack)
        result = _Extent(1, 0)
        if name.startswith("TUPLE"):
            result = _extent_of_container(operands)
        elif name in {"SETITEM", "SETITEMS", "REDUCE"}:
            hashed += sum(extent.values for extent in operands)

        has_too_many = result.values > MAX_VALUES or cost + hashed > MAX_VALUES
        if has_too_many or result.levels > MAX_LEVELS:
            raise ValueError("a tuple has too many values or levels")
        stack += [result] * len(operation.stack_after)

    return hashed


def _take_operands(
    operation: pickletools.OpcodeInfo, stack: list[_Extent | None]
) -> list[_Extent]:
    """Take from *stack* what *operation* takes; return what is above the last mark or, without one, all."""
    before = operation.stack_before
    if pickletools.markobject not in before:
        taken = [stack.pop() for _ in before]
        return [extent for extent in taken if extent is not None]

    # The operands above the mark, the mark, and what the operation names below it.
    operands: list[_Extent] = []
    while (extent := stack.pop()) is not None:
        operands.append(extent)
    for _ in range(before.index(pickletools.markobject)):
        stack.pop()
    return operands


def _extent_of_container(parts: Sequence[_Extent]) -> _Extent:
    """Return the extent of a container of *parts*."""
    values = 1 + sum(extent.values for extent in parts)
    levels = 1 + max((extent.levels for extent in parts), default=0)
    return _Extent(values, levels)


def distinct_values(content: Any) -> list[Any]:
    """List each object in *content* once, without the containers, in linear time.

    Raises `ValueError` for more than `MAX_VALUES`, counted wherever they are named, for more
    than `MAX_LEVELS`, and if *content* contains itself.
    """
    leaves: list[Any] = []
    extents: dict[int, _Extent | None] = {}  # by the id of an object; None: being measured

    def measure(value: Any, outer_levels: int) -> _Extent:
        """Measure *value*, once for each object; add it to *leaves* if it is not a container."""
        if id(value) in extents:
            known = extents[id(value)]
            if known is None:
                raise ValueError("a list contains itself")
            return known

        if outer_levels > MAX_LEVELS:  # before Python's limit of recursion
            raise ValueError("its lists have too many levels")

        parts = vars(value) if isinstance(value, Namespace) else value
        if isinstance(parts, dict):
            parts = [*parts.keys(), *parts.values()]
        if isinstance(parts, list | tuple | set | frozenset):
            extents[id(value)] = None
            extent = _extent_of_container([measure(part, outer_levels + 1) for part in parts])
            if extent.values > MAX_VALUES or extent.levels > MAX_LEVELS:
                raise ValueError("its lists name too many values or have too many levels")
        else:
            extent = _Extent(1, 0)
            leaves.append(value)

        extents[id(value)] = extent
        return extent

    measure(content, 0)
    return leaves
