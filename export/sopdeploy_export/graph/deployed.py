"""The network as it is deployed: normalization, the network, the outputs to export; and probe images."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone
from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.covariance import at_least_float32
from sopdeploy.layers.normalize import Normalize, images_format
from sopdeploy_export.state import (
    DEPTH,
    NOT_IN_EVAL,
    STATELESS,
    modules,
    tensors,
)
from sopdeploy_export.stubs import answering

INPUT = "images"
EXPORT_LOGITS = "export_logits"  # attribute of a network outside of the catalog, see `_network_outputs`
EXPORT_EMBEDDING = "export_embedding"  # attribute of any network, see `compute_outputs`
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
        """Compute the outputs of (B, H, W, 3) uint8 *images*, in float32 or float64."""
        before = {name: (tensor, *_storage(tensor)) for name, tensor in tensors(self.network).items()}
        outputs = compute_outputs(self.network, self.normalise(images))
        _check_unwritten(self.network, before)
        return tuple(at_least_float32(value) for value in outputs)


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Return the version of *tensor*, which a write to it changes, and the address of its memory."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
        return 0, 0  # tensors of torch.export's tracing have no address, inference tensors no version
    return tensor._version, tensor.data_ptr()


def _check_unwritten(network: nn.Module, before: Mapping[str, tuple[Tensor, int, int]]) -> None:
    """Raise `LoweringError` if a tensor of *network* was written to or replaced since *before* was read."""
    after = tensors(network)
    for name, (tensor, *storage) in before.items():
        if after.get(name) is not tensor or _storage(tensor) != tuple(storage):
            owner = dict(modules(network)).get(name.rpartition(".")[0])
            scales_rows = getattr(owner, "max_norm", None) is not None  # as `nn.Embedding` can
            remedy = f"{STATELESS}: scale its rows once, and set max_norm to None"
            remedy = remedy if scales_rows else NOT_IN_EVAL
            raise LoweringError(f"the network writes to {name} while it runs; {remedy}")


def output_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the exported outputs of *network*, class logits first."""
    names = network.outputs if isinstance(network, Backbone) else Backbone.outputs
    return (*names, EMBEDDING) if EXPORT_EMBEDDING in vars(network) else names


def compute_outputs(network: nn.Module, pixels: Tensor) -> tuple[Tensor, ...]:
    """Compute the exported outputs of *network*, in eval mode, for normalized *pixels* (B, 3, H, W).

    If *network* has an attribute `export_embedding`, the name of a linear layer, the input (B, D) of this
    layer is the last output. Raises the errors of `_network_outputs`.
    """
    with answering(pixels):
        if (name := vars(network).get(EXPORT_EMBEDDING)) is None:
            return _network_outputs(network, pixels)
        inputs: list[Tensor] = []
        layer = network.get_submodule(name)
        with layer.register_forward_pre_hook(lambda _, values: inputs.append(values[0])):
            outputs = _network_outputs(network, pixels)
        return (*outputs, inputs[0])


def _network_outputs(network: nn.Module, pixels: Tensor) -> tuple[Tensor, ...]:
    """Compute the outputs of *network*, without an embedding, for normalized *pixels* (B, 3, H, W).

    If a network outside of the catalog returns a container, its attribute `export_logits` says which of the
    tensors in it are the logits, as `choose_output` does. Raises `LoweringError` if there are no logits.
    """
    if isinstance(network, Backbone):
        return network.outputs_tuple(pixels)
    output, key = network(pixels), vars(network).get(EXPORT_LOGITS)
    if key is not None and not isinstance(output, Tensor):
        output = choose_output(output, key)
    if not isinstance(output, Tensor):
        outputs = output_shapes(output, "" if key is None else str(key))
        found = ", ".join(f"{path} {shape}" for path, shape in outputs) or "it holds no tensor"
        problem = f"the network returns {_describe(output)}; choose one as the logits: {found}"
        raise LoweringError(problem, remedies={"logits_key": None})
    return (output,)


def choose_output(output: Any, key: str | int) -> Any:
    """Choose the tensor *key* of *output*: an attribute, key or index, or several of them, as `0.2`.

    Raises `LoweringError` if *output* has none.
    """
    chosen = output
    steps = [key] if isinstance(key, int) or _has(output, key) else key.split(".")
    for step in steps:
        if not _has(chosen, step):
            found = ", ".join(path for path, _ in output_shapes(output))
            problem = f"the network returns {_describe(output)}, without logits {key!r}; it has {found}"
            raise LoweringError(problem, setting="logits_key", value=key)
        chosen = _item(chosen, step)
    return chosen


def _has(output: Any, key: str | int) -> bool:
    try:
        _item(output, key)
    except (AttributeError, LookupError, TypeError, ValueError):
        return False
    return True


def _item(output: Any, key: str | int) -> Any:
    if isinstance(output, Mapping):
        return output[key] if key in output else output[int(key)]
    if isinstance(key, str) and hasattr(output, key):
        return getattr(output, key)
    return output[int(key)]


def output_shapes(output: Any, path: str = "") -> list[tuple[str, str]]:
    """List the tensors in *output*, what a network returned, with the keys that choose them."""
    if isinstance(output, Tensor):
        sizes = [str(size) if isinstance(size, int) else "B" for size in output.shape]
        return [(path, f"({', '.join(sizes)})")]
    fields = getattr(output, "_fields", None)
    if path.count(".") > DEPTH:
        return []
    if isinstance(output, Mapping):
        items = [(str(key), value) for key, value in output.items()]
    elif fields is not None or not isinstance(output, list | tuple):
        items = [(name, getattr(output, name)) for name in fields or vars_of(output)]
    else:
        items = [(str(index), value) for index, value in enumerate(output)]
    inner = f"{path}." if path else ""
    return [found for key, value in items for found in output_shapes(value, inner + key)]


def vars_of(output: Any) -> Mapping[str, Any]:
    """Return the attributes of an object; none if it has no dict of them."""
    held: Mapping[str, Any] = {} if callable(output) else getattr(output, "__dict__", {})
    return held


def _describe(output: Any) -> str:
    """Describe *output*, the return value of a network: its type with its keys, fields or length."""
    if isinstance(output, Mapping):
        return f"a dict with {', '.join(map(repr, output))}"
    if (fields := getattr(output, "_fields", None)) is not None:
        return f"a named tuple with {', '.join(fields)}"
    length = f" of {len(output)}" if isinstance(output, list | tuple) else ""
    return f"a {type(output).__name__}{length}"


def generated_images(side: int) -> NDArray[np.uint8]:
    """Generate the images on which the file is compared, uint8 (12, side, side, 3), always the same ones."""
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
    return np.stack([np.clip(np.rint(image), 0, 255).astype(np.uint8) for image in images])


def evenly_spread(count: int, most: int) -> NDArray[np.int64]:
    """Choose at most *most* of *count* positions, evenly spread."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)
