"""What a failed capture says to the owner of the network: what, where, and what to do.

torch writes for those who develop torch. Causes that are known get a sentence of this package;
of any other one, torch's first sentence stays, shortened, beside the line of the network.
"""

import linecache
import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from sopdeploy.errors import LoweringError, first_line

# Code whose lines tell a user nothing; packages of others can lie within that of Python.
_FOREIGN = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
_OF_PYTHON = sysconfig.get_path("stdlib")
_MOST_OF_TORCH = 160  # characters of torch's sentence
_MOST_OF_LINE = 100

NO_GRAPH = "cannot be captured as one graph"
# How torch.export says that code depends on the batch size.
BATCH_GUARD = re.compile(r"generated guard|to be a constant|marked \w+ as dynamic")
DATA_DEPENDENT = re.compile(r"data-dependent expression")


class _Cause(NamedTuple):
    """How torch tells a cause; what the network does; what to write instead."""

    words: re.Pattern[str]
    problem: str
    remedy: str

    def describe(self, match: re.Match[str], place: str) -> str:
        """Say what the network does at *place*, and what to write instead."""
        comma = "," if place else ""
        return f"{match.expand(self.problem)}{comma}{place}; {self.remedy}"


BY_SIZE = _Cause(
    BATCH_GUARD,
    "its code treats some batch sizes differently, or fixes the size",
    "every size needs one graph: write x.shape[0] for len(x) and int(x.shape[0]), a // b for int(a / b), and "
    "compute all images of a batch at once instead of in a loop",
)
ON_VALUES = _Cause(
    DATA_DEPENDENT,
    "its code depends on values of the image, as `x[mask]` or `if` does",
    "use torch.where",
)
DEPENDS_ON_VALUES = f"{ON_VALUES.problem}; {ON_VALUES.remedy}"
_CAUSES = (
    BY_SIZE,
    ON_VALUES,
    _Cause(
        re.compile(r"unhashable type.*SymInt"),
        "its code uses the batch size as a key, as in cache[x.shape]",
        "use the other sizes only",
    ),
    # What torch says of `cond`, `while_loop`, `scan` and `map` that it does not capture.
    _Cause(
        re.compile("higher order operator doesn't work unless"),
        "a graph has no control flow",
        "compute all branches, and choose with torch.where",
    ),
    _Cause(
        re.compile(r"TensorWrapper|does not require grad"),
        "its code computes gradients while it runs, which no graph has",
        "write the derivative with operators of torch",
    ),
    _Cause(
        re.compile(
            r"\.numpy\(\) is not supported|access (?:data pointer|storage)|Can't pickle"
        ),
        "its code takes tensors out of torch, as numpy, data_ptr and copy.deepcopy do",
        "use operators of torch",
    ),
    # Operators ran, but no graph has them: it has their results, as constants without values.
    _Cause(
        re.compile(r"fake tensor in the exported program constant's list"),
        "it computes where torch.export sees no operators, as torch.vmap over another axis than the first "
        "and other threads do",
        "move that axis to the front, x.movedim(axis, 0), and call vmap without in_dims and out_dims, or use "
        "broadcasting; compute in the thread of the call",
    ),
    _Cause(
        re.compile(r"UnsupportedOperatorException: (\S+)"),
        r"torch.export does not know \1 for sparse, nested or quantized tensors",
        "use dense tensors of floating-point numbers",
    ),
    _Cause(
        re.compile(r"at least two devices, (\S+) and (\w+)"),
        r"its code puts tensors on \1 and on \2",
        "write .to(x.device) or device=x.device",
    ),
    _Cause(
        re.compile("randomness error mode"),
        "its code draws random numbers in torch.vmap",
        "remove them",
    ),
)


def describe_failure(error: BaseException) -> str:
    """Say in one line what *error*, raised in a capture, means: what, where in the network, and what to do."""
    causes = [
        cause for cause in (error, error.__cause__, error.__context__) if cause is not None
    ]
    text = "\n".join(f"{type(cause).__name__}: {cause}" for cause in causes)
    place = next((place for cause in causes for place in _places(cause)), "")

    for known in _CAUSES:
        if match := known.words.search(text):
            return known.describe(match, place)

    problem = first_line(error)
    if not problem.startswith(type(error).__name__):
        return problem  # `first_line` knows the cause, and says what to do
    sentence = _cut(problem.rstrip("."), _MOST_OF_TORCH)
    return f"the capture stops{place}: {sentence}; use other operators of torch"


def no_graph(error: BaseException) -> LoweringError:
    """Make the error of a capture that *error* ended."""
    return LoweringError(f"{NO_GRAPH}: {describe_failure(error)}")


def at_line(file: str, number: int) -> str:
    """Write a place in code as ` in net.py:12 (the line)`."""
    line = _cut(linecache.getline(file, number).strip(), _MOST_OF_LINE)
    return f" in {Path(file).name}:{number} ({line})"


def _cut(text: str, most: int) -> str:
    """Return *text*, of which at most *most* characters stay."""
    return text if len(text) <= most else f"{text[:most]} ..."


def _places(error: BaseException) -> Iterator[str]:
    """Yield the lines of the network's code that *error* passed, the innermost first."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = frame.filename
        is_of_python = file.startswith(_OF_PYTHON) and "site-packages" not in file
        if frame.lineno and not file.startswith(_FOREIGN) and not is_of_python:
            yield at_line(file, frame.lineno)
