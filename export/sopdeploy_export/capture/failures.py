"""What a failed capture says to the owner of the network: what, where, and what to do.

torch writes for those who develop torch. Causes that are known get a sentence of this package;
of any other one, torch's first sentence stays, shortened, beside the line of the network.
"""

import re
import traceback
from typing import NamedTuple

from sopdeploy.errors import LoweringError, describe_known, first_line
from sopdeploy_export.network import at_line, is_network_code, shortened

_MOST_OF_TORCH = 160  # characters of torch's sentence

NO_GRAPH = "cannot be captured as one graph"
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
    re.compile(r"generated guard|to be a constant|marked \w+ as dynamic"),
    "its code treats some batch sizes differently, or fixes the size",
    "every size needs one graph: write x.shape[0] for len(x) and int(x.shape[0]), a // b for int(a / b), and "
    "compute all images of a batch at once instead of in a loop",
)
ON_VALUES = _Cause(
    DATA_DEPENDENT,
    "its code depends on values of the image, or on values that it computes of weights, as `x[mask]`, `if` or "
    ".item() does",
    "use torch.where, or compute what depends on weights alone in __init__",
)
# What torch says of `cond`, `while_loop`, `scan` and `map` that it does not capture.
CONTROL_FLOW = _Cause(
    re.compile("higher order operator doesn't work unless"),
    "a graph has no control flow",
    "compute all branches, and choose with torch.where",
)
DEPENDS_ON_VALUES = f"{ON_VALUES.problem}; {ON_VALUES.remedy}"
NO_CONTROL_FLOW = f"{CONTROL_FLOW.problem}; {CONTROL_FLOW.remedy}"
_CAUSES = (
    BY_SIZE,
    ON_VALUES,
    _Cause(
        re.compile(r"unhashable type.*SymInt"),
        "its code uses the batch size as a key, as in cache[x.shape]",
        "use the other sizes only",
    ),
    CONTROL_FLOW,
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
        "it computes where torch.export sees no operators: in a write through .data, in torch.vmap over another "
        "axis than the first, or in another thread",
        "for .data, compute a new tensor, as x = x * 2 or torch.where do; for vmap, move that axis to the "
        "front, x.movedim(axis, 0), and call vmap without in_dims and out_dims, or use "
        "broadcasting; for a thread, compute in the thread of the call",
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
    # torch.export passes a module of TorchScript to its forward twice. Other code that is called
    # with a wrong number of arguments fails before the capture, in the first run.
    _Cause(
        re.compile(r"forward\(\) takes \d+ positional arguments? but \d+ were given"),
        "torch.jit.script made the network or a part of it, and no graph has such a part",
        "build it from its Python class",
    ),
)


def describe_failure(error: BaseException) -> str:
    """Say in one line what *error*, raised in a capture, means: what, where in the network, and what to do."""
    causes = [
        cause for cause in (error, error.__cause__, error.__context__) if cause is not None
    ]
    text = "\n".join(f"{type(cause).__name__}: {cause}" for cause in causes)
    place = next(filter(None, map(failing_line, causes)), "")

    for known in _CAUSES:
        if match := known.words.search(text):
            return known.describe(match, place)

    if sentence := describe_known(error):
        return sentence
    sentence = shortened(first_line(error).rstrip("."), _MOST_OF_TORCH)
    return f"the capture stops{place}: {sentence}; use other operators of torch"


def no_graph(error: BaseException) -> LoweringError:
    """Make the error of a capture that *error* ended."""
    return LoweringError(f"{NO_GRAPH}: {describe_failure(error)}")


def failing_line(error: BaseException) -> str:
    """Write the innermost line of the network's code that *error* passed, as `at_line` does; "" without one."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.lineno and is_network_code(frame.filename):
            return at_line(frame.filename, frame.lineno)
    return ""
