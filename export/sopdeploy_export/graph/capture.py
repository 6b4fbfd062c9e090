"""The network as it is deployed, captured as a torch.export program; and probe images.

The program takes uint8 images (batch, height, width, 3) from `Preprocess`, normalizes them and returns
float32 outputs for any batch size of the bundle; a program that does not support the whole range is rejected.
"""

import gc
import io
import linecache
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.sym_node import SymNode

from sopdeploy.backbones.base import Backbone
from sopdeploy.bundle.manifest import EMBEDDING, BatchRange
from sopdeploy.errors import LoweringError, SopdeployError, first_line
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy.layers.normalize import Normalize, images_format
from sopdeploy_export.detach.stubs import SIZES, answering
from sopdeploy_export.graph.forms import SymbolicForms, simplify_operators
from sopdeploy_export.network import modules, tensors
from sopdeploy_export.program_hashes import Trace, trace_hash
from sopdeploy_export.state import DEPTH, NOT_IN_EVAL, STATELESS, identify, preserved, recording_calls

INPUT = "images"
EXPORT_LOGITS = "_sopdeploy_logits"  # attribute of a network outside of the catalog, see `_network_outputs`
EXPORT_EMBEDDING = "_sopdeploy_embedding"  # attribute of any network, see `compute_outputs`
NETWORK_PREFIX = "network."  # the attribute of `Deployed` that holds the network
_SEED = 20_240_117
GENERATED = 12


class Deployed(nn.Module):
    """Normalization followed by *network*: the module that is captured and exported.

    Every run, also while it is captured, raises `LoweringError` if the network writes to one of its tensors.
    """

    def __init__(self, network: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.normalise = Normalize(preprocess, images_format(network))
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of (B, H, W, 3) uint8 *images* in float32, or within `InFloat64` in float64.

        Raises `LoweringError` if the network writes to its tensors, or as `compute_outputs` does.
        """
        before = {name: identify(tensor) for name, tensor in tensors(self.network).items()}
        outputs = compute_outputs(self.network, self.normalise(images))
        after = tensors(self.network)
        for name, identity in before.items():
            if name not in after or identify(after[name]) != identity:
                owner = dict(modules(self.network)).get(name.rpartition(".")[0])
                remedy = NOT_IN_EVAL
                if getattr(owner, "max_norm", None) is not None:  # as `nn.Embedding` can
                    remedy = f"{STATELESS}: scale its rows once, and set max_norm to None"
                raise LoweringError(f"the network writes to {name} while it runs; {remedy}")
        return tuple(value if value.dtype == torch.float32 else value.float() for value in outputs)


def output_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the exported outputs of *network*, class logits first."""
    names = network.outputs if isinstance(network, Backbone) else Backbone.outputs
    return (*names, EMBEDDING) if EXPORT_EMBEDDING in vars(network) else names


def compute_outputs(network: nn.Module, pixels: Tensor) -> tuple[Tensor, ...]:
    """Compute the exported outputs of *network*, in eval mode, for normalized *pixels* (B, 3, H, W).

    If *network* has an attribute `EXPORT_EMBEDDING`, the name of a linear layer, the input (B, D) of this
    layer is the last output. Raises the errors of `_network_outputs`.
    """
    embedding_layer = vars(network).get(EXPORT_EMBEDDING)
    with answering(pixels):
        if embedding_layer is None:
            return _network_outputs(network, pixels)
        inputs: list[Tensor] = []
        layer = network.get_submodule(embedding_layer)
        with layer.register_forward_pre_hook(lambda _, values: inputs.append(values[0])):
            outputs = _network_outputs(network, pixels)
        return (*outputs, inputs[0])


def _network_outputs(network: nn.Module, pixels: Tensor) -> tuple[Tensor, ...]:
    """Compute the outputs of *network*, without an embedding, for normalized *pixels* (B, 3, H, W).

    If a network outside of the catalog returns a container, its attribute `EXPORT_LOGITS` says which of the
    tensors in it are the logits, as `choose_output` does. Raises `LoweringError` if there are no logits.
    """
    if isinstance(network, Backbone):
        return network.outputs_tuple(pixels)
    output, key = network(pixels), vars(network).get(EXPORT_LOGITS)
    if key is not None and not isinstance(output, Tensor):
        output = choose_output(output, key)
    if not isinstance(output, Tensor):
        shapes = list_tensor_keys(output, "" if key is None else str(key))
        choices = ", ".join(f"{path} {shape}" for path, shape in shapes) or "it holds no tensor"
        problem = f"the network returns {_describe_output(output)}; choose one as the logits: {choices}"
        raise LoweringError(problem, remedies={"logits_key": None})
    return (output,)


def choose_output(output: Any, key: str | int) -> Any:
    """Choose the tensor *key* of *output*: an attribute, key or index, or several of them, as `0.2`.

    Raises `LoweringError` if *output* has none.
    """
    chosen = output
    steps = [key] if isinstance(key, int) or _has_key(output, key) else key.split(".")
    for step in steps:
        if not _has_key(chosen, step):
            paths = ", ".join(path for path, _ in list_tensor_keys(output))
            problem = (
                f"the network returns {_describe_output(output)}, without logits {key!r}; it has {paths}"
            )
            raise LoweringError(problem, setting="logits_key", value=key)
        chosen = _look_up(chosen, step)
    return chosen


def _has_key(output: Any, key: str | int) -> bool:
    """Return whether *output*, what a network returned, has an attribute, key or index *key*."""
    try:
        _look_up(output, key)
    except (AttributeError, LookupError, TypeError, ValueError):
        return False
    return True


def _look_up(output: Any, key: str | int) -> Any:
    """Return the attribute, key or index *key* of *output*; raises various errors if it has none."""
    if isinstance(output, Mapping):
        return output[key] if key in output else output[int(key)]
    if isinstance(key, str) and hasattr(output, key):
        return getattr(output, key)
    return output[int(key)]


def list_tensor_keys(output: Any, path: str = "") -> list[tuple[str, str]]:
    """List (key, shape) of the tensors in *output*, what a network returned.

    A key chooses the tensor, as in `choose_output`; *path* is the key of *output* itself. The deepest listed
    tensor is in `DEPTH` + 2 containers.
    """
    if isinstance(output, Tensor):
        sizes = [str(size) if isinstance(size, int) else "B" for size in output.shape]
        return [(path, f"({', '.join(sizes)})")]
    if path.count(".") > DEPTH:  # outputs can refer to themselves
        return []
    fields = getattr(output, "_fields", None)  # of a named tuple
    if isinstance(output, Mapping):
        children = [(str(key), value) for key, value in output.items()]
    elif isinstance(output, list | tuple) and fields is None:
        children = [(str(index), value) for index, value in enumerate(output)]
    else:
        # A function or a module holds no outputs; some objects have no dict.
        attributes = {} if callable(output) else getattr(output, "__dict__", {})
        children = [(name, getattr(output, name)) for name in fields or attributes]
    listed = []
    for key, value in children:
        listed += list_tensor_keys(value, f"{path}.{key}" if path else key)
    return listed


def _describe_output(output: Any) -> str:
    """Describe *output*, the return value of a network: its type with its keys, fields or length."""
    if isinstance(output, Mapping):
        return f"a dict with {', '.join(map(repr, output))}"
    if (fields := getattr(output, "_fields", None)) is not None:
        return f"a named tuple with {', '.join(fields)}"
    length = f" of {len(output)}" if isinstance(output, list | tuple) else ""
    return f"a {type(output).__name__}{length}"


def generated_images(side: int) -> NDArray[np.uint8]:
    """Generate the images on which the file is compared, uint8 (12, side, side, 3), always the same ones.

    There are fewer if *side* is at most 4, because some are equal then.
    """
    random = np.random.default_rng(_SEED)
    horizontal_ramp = np.tile(np.linspace(0, 255, side), (side, 1))
    square = np.arange(side) // 4  # number of the square, 4 pixels wide, that a row or column belongs to
    checkerboard = 255.0 * ((square[:, None] + square) % 2)
    colors = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [
        *(np.broadcast_to(color, (side, side, 3)) for color in colors),
        np.stack([checkerboard] * 3, axis=2),
        np.stack([horizontal_ramp, horizontal_ramp.T, checkerboard], axis=2),
        random.integers(0, 256, (side, side, 3)),
    ]
    for i in range(GENERATED - len(images)):  # the others are enlarged noise, first the coarsest
        size = min(side, 2 + 6 * i)
        noise = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        images.append(np.asarray(Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)))
    pixels = [np.clip(np.rint(image), 0, 255).astype(np.uint8) for image in images]
    return np.stack([*{image.tobytes(): image for image in pixels}.values()])


def evenly_spread(count: int, most: int) -> NDArray[np.int64]:
    """Choose at most *most* of *count* positions, evenly spread."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)


# How torch.export says that code depends on the batch size.
BATCH_GUARD = re.compile(r"generated guard|to be a constant|marked \w+ as dynamic")
NO_GRAPH = "cannot be captured as one graph"
BY_SIZE = "its code treats some batch sizes differently, or fixes the size"
SIZE_REMEDY = (
    "every size needs one graph: write x.shape[0] for len(x) and int(x.shape[0]), a // b for int(a / b), and "
    "compute all images of a batch at once instead of in a loop"
)
HASHED_SIZE = re.compile(r"unhashable type.*SymInt")
SIZE_IS_KEY = "its code uses the batch size as a key, as in cache[x.shape]: use the other sizes only"
DATA_DEPENDENT = re.compile(r"data-dependent expression")
DEPENDS_ON_VALUES = "its code depends on values of the image, as `x[mask]` or `if` does: use torch.where"


@dataclass(frozen=True, kw_only=True, slots=True)
class Captured:
    """The functional torch.export programs of one network: for the whole batch range and for a batch of one.

    `traces` are the hashes of both programs before they were made functional; None: it cannot be hashed.
    """

    any_batch: ExportedProgram
    batch_of_one: ExportedProgram
    traces: tuple[Trace | None, ...]


def capture(
    network: nn.Module, preprocess: Preprocess, batch: BatchRange, known: Sequence[Captured] = ()
) -> Captured:
    """Capture *network*, in eval mode, for the batch range and for a batch of one.

    torch.export assumes that a dynamic dimension is at least 2, so only the second program shows code that
    handles a single image differently. If torch.export gives the same two programs as for one of *known*,
    this one is returned, because making programs functional takes longer than torch.export.
    Raises `LoweringError` if the network cannot be captured.
    """
    # For one image, the program of the whole range is also that of a batch of one.
    ranges = [batch] if batch.maximum == 1 else [batch, BatchRange(optimum=1, maximum=1)]
    traced = [trace_network(network, preprocess, sizes) for sizes in ranges]
    traces = tuple(map(trace_hash, traced))
    for captured in known:
        if captured.traces == traces and None not in traces:
            return captured
    programs = [make_functional(program, sizes) for program, sizes in zip(traced, ranges, strict=True)]
    return Captured(any_batch=programs[0], batch_of_one=programs[-1], traces=traces)


def capture_any_batch(network: nn.Module, preprocess: Preprocess, batch: BatchRange) -> ExportedProgram:
    """Capture *network* for every batch size of the range, as one functional program.

    Raises the errors of `trace_network` and `make_functional`.
    """
    return make_functional(trace_network(network, preprocess, batch), batch)


def trace_network(network: nn.Module, preprocess: Preprocess, batch: BatchRange) -> ExportedProgram:
    """Run torch.export on *network* for every batch size of the range; *network* is unchanged afterwards.

    Raises `LoweringError` with the first line of torch's message.
    """
    deployed = Deployed(network, preprocess).eval()
    size = min(2, batch.maximum)  # torch.export makes a dimension of size 1 constant
    images = torch.zeros(size, preprocess.crop, preprocess.crop, 3, dtype=torch.uint8)
    shapes = None if size == 1 else ({0: Dim("batch", min=1, max=batch.maximum)},)
    with (
        capturing(),  # raises the `LoweringError`
        SymbolicForms(),  # replaces functions that fit one batch size only
        redirect_stderr(io.StringIO()),  # torch prints part of the graph on failure
        preserved(deployed),  # resets `is_captured`, and caches, where torch leaves tensors without values
        warnings.catch_warnings(action="ignore"),  # torch warns about caches that forward assigns
    ):
        for _, module in modules(deployed):
            if isinstance(module, ExportHints):
                module.is_captured = True
        try:
            return torch.export.export(deployed, (images,), dynamic_shapes=shapes)
        except Exception as error:  # the network's own code, which can raise anything
            if not BATCH_GUARD.search(str(error)):
                raise
            with recording_fixed_sizes() as places, suppress(Exception):  # fails again
                torch.export.export(deployed, (images,), dynamic_shapes=shapes)
            where = f" in {places[0]}" if places else ""
            raise LoweringError(f"{NO_GRAPH}: {BY_SIZE}{where}; {SIZE_REMEDY}") from error


@contextmanager
def recording_fixed_sizes() -> Iterator[list[str]]:
    """Yield a list, and record in it the lines of code in the block that need sizes as numbers.

    Code of torch and of this package does not count.
    """
    places: list[str] = []
    needs_number, compares = SymNode.guard_int.__code__, SymNode.guard_bool.__code__

    def record(frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or frame.f_code not in (needs_number, compares):
            return
        caller = frame.f_back
        while caller is not None:
            module = str(caller.f_globals.get("__name__", ""))
            if module.partition(".")[0] not in ("torch", "sopdeploy", "sopdeploy_export"):
                file, line = caller.f_code.co_filename, caller.f_lineno
                places.append(f"{Path(file).name}:{line} ({linecache.getline(file, line).strip()})")
                return
            # A comparison in a network comes through these modules alone. Those of torch's operators, which
            # come through others, fit every size.
            if frame.f_code is compares and module not in ("torch", SymNode.__module__):
                return
            caller = caller.f_back

    with recording_calls(record):
        yield places


def make_functional(program: ExportedProgram, batch: BatchRange) -> ExportedProgram:
    """Replace writes to operands, some forms of pooling, and the ellipsis of `einsum` in *program*.

    Raises `LoweringError` if torch cannot do this, or if some batch of 1 to `batch.maximum` is not accepted.
    """
    with capturing():
        simplify_operators(program)
        program = program.run_decompositions({})
    if batch.maximum == 1:
        return program
    name = program.graph_signature.user_inputs[0]
    dimension = next(node for node in program.graph.nodes if node.name == name).meta["val"].shape[0]
    if isinstance(dimension, int):
        raise LoweringError(f"the network fixes the batch size to {dimension}; it must accept every size")
    # torch.export narrows the range that `trace_network` asks for, 1 to `batch.maximum`, if code requires it.
    allowed = program.range_constraints[dimension.node.expr]
    if int(allowed.lower) > 1 or int(allowed.upper) != batch.maximum:
        raise LoweringError(
            f"the network accepts batches of {allowed.lower} to {allowed.upper} images only, not of "
            f"1 to {batch.maximum}; its code depends on the batch size"
        )
    return program


@contextmanager
def capturing() -> Iterator[None]:
    """Run a step of the capture; raise `LoweringError` with the first line of torch's message if it fails.

    The garbage collector is off, because it would visit all nodes of a graph again and again, which takes a
    tenth of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    except SopdeployError:
        raise
    except Exception as error:  # tracing runs the network's own code, which can raise anything
        causes = (error, error.__cause__, error.__context__)
        text = "\n".join(str(cause) for cause in causes if cause is not None)
        if BATCH_GUARD.search(text):
            problem = f"{BY_SIZE}; {SIZE_REMEDY}"
        elif HASHED_SIZE.search(text):
            problem = SIZE_IS_KEY
        elif DATA_DEPENDENT.search(text):
            problem = DEPENDS_ON_VALUES
        else:
            problem = first_line(error)
        raise LoweringError(f"{NO_GRAPH}: {problem}") from error
    finally:
        if was_enabled:
            gc.enable()


def probe_pixels(network: nn.Module, preprocess: Preprocess) -> Tensor:
    """Normalize the last of the generated images, in the layout of *network*: (3, 3, H, W)."""
    images = torch.from_numpy(generated_images(preprocess.crop)[-max(SIZES) :])
    return Normalize(preprocess, images_format(network))(images)
