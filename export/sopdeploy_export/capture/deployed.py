"""The network as it is deployed: from uint8 images to its outputs; and the images that are generated."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from sopdeploy.bundle.manifest import EMBEDDING
from sopdeploy.errors import LoweringError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize, images_format
from sopdeploy.models.backbones.base import Backbone
from sopdeploy_export.network import DEPTH, modules, tensors, unstored_buffers

STATELESS = "an exported network must be stateless"
NOT_IN_EVAL = f"{STATELESS}: keep values in local variables, or only if self.training"
INPUT = "images"
# Attribute of a network outside of the catalog, see `_network_outputs`
EXPORT_LOGITS = "_sopdeploy_logits"
EXPORT_TWO_CLASSES = "_sopdeploy_two_classes"  # also of such a network
EXPORT_EMBEDDING = "_sopdeploy_embedding"  # attribute of any network, see `compute_outputs`
_SEED = 20_240_117
CELLS = 14  # of noise along a side, which make something like a photo
LETTERBOX = 114  # the gray that detectors pad images with


class Deployed(nn.Module):
    """Normalization followed by *network*: the module that is captured and exported.

    Every run, also while it is captured, raises `LoweringError` if the network writes to one of
    its tensors, except to buffers that no state dict stores.
    """

    def __init__(self, network: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.normalise = Normalize(preprocess, images_format(network))
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of (B, H, W, 3) uint8 *images* in float32, or within `InFloat64` in float64.

        Raises `LoweringError` if the network writes to its tensors, and the errors of
        `compute_outputs`.
        """
        before = _states(self.network)
        outputs = compute_outputs(self.network, self.normalise(images))
        _refuse_writes(self.network, before)

        # Within `InFloat64`, which turns casts to float32 into casts to float64, `float` gives
        # float64.
        return tuple(
            value if value.dtype == torch.float32 else value.float() for value in outputs
        )


def _states(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the `_state` of each tensor of *network* by name.

    A buffer that no state dict stores is left out: the network may make it anew, for example a
    table for another size.
    """
    unstored = unstored_buffers(network)
    return {
        name: _state(tensor)
        for name, tensor in tensors(network).items()
        if name not in unstored
    }


def _state(tensor: Tensor) -> tuple[int, ...]:
    """Identify *tensor* and its content, by numbers that a write changes."""
    # Tensors of torch.export's tracing have no address, and those of inference mode no version.
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return (id(tensor),)
    version = -1 if tensor.is_inference() else tensor._version
    return id(tensor), version, tensor.data_ptr()


def _refuse_writes(network: nn.Module, before: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `LoweringError` if a tensor of *network* has another state than *before*, its states by name."""
    after = tensors(network)

    for name, state in before.items():
        if name not in after or _state(after[name]) != state:
            owner = dict(modules(network)).get(name.rpartition(".")[0])
            remedy = NOT_IN_EVAL
            if getattr(owner, "max_norm", None) is not None:  # as `nn.Embedding` can
                remedy = f"{STATELESS}: scale its rows once, and set max_norm to None"
            raise LoweringError(f"the network writes to {name} while it runs; {remedy}")


def output_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the exported outputs of *network*, class logits first."""
    names = network.outputs if isinstance(network, Backbone) else Backbone.outputs
    return (*names, EMBEDDING) if EXPORT_EMBEDDING in vars(network) else names


def compute_outputs(network: nn.Module, pixels: Tensor) -> tuple[Tensor, ...]:
    """Compute the exported outputs of *network*, in eval mode, for normalized *pixels* (B, 3, H, W).

    If *network* has an attribute `EXPORT_EMBEDDING`, the name of a linear layer, the input (B,
    D) of this layer is the last output. Raises the errors of `_network_outputs`.
    """
    embedding_layer = vars(network).get(EXPORT_EMBEDDING)
    if embedding_layer is None:
        return _network_outputs(network, pixels)

    # A hook sees the input of the layer.
    inputs: list[Tensor] = []
    layer = network.get_submodule(embedding_layer)
    with layer.register_forward_pre_hook(lambda _, values: inputs.append(values[0])):
        outputs = _network_outputs(network, pixels)
    return (*outputs, inputs[0])


def _network_outputs(network: nn.Module, pixels: Tensor) -> tuple[Tensor, ...]:
    """Compute the outputs of *network*, without an embedding, for normalized *pixels* (B, 3, H, W).

    If a network outside of the catalog returns a container, its attribute `EXPORT_LOGITS` says
    which of the tensors in it are the logits, as `choose_output` does. If it has an attribute
    `EXPORT_TWO_CLASSES` and a single logit, this becomes the logit of the second class, and 0 that
    of the first: their softmax is the sigmoid of the logit. Raises `LoweringError` if there are no
    logits.
    """
    if isinstance(network, Backbone):
        return network.outputs_tuple(pixels)

    # A network of the user returns the logits alone, or the key says where they are.
    output = network(pixels)
    key = vars(network).get(EXPORT_LOGITS)
    if key is not None and not isinstance(output, Tensor):
        output = choose_output(output, key)

    if not isinstance(output, Tensor):
        shapes = list_tensor_keys(output, "" if key is None else str(key))
        choices = ", ".join(f"{path} {shape}" for path, shape in shapes) or "it holds no tensor"
        problem = f"the network returns {_describe_output(output)}; choose one as the logits: {choices}"
        raise LoweringError(problem, remedies={"logits_key": None})

    has_one_logit = output.ndim == 2 and output.shape[1] == 1
    if has_one_logit and EXPORT_TWO_CLASSES in vars(network):
        output = nn.functional.pad(output, (1, 0))
    return (output,)


def choose_output(output: Any, key: str | int) -> Any:
    """Return what *key* names in *output*: an attribute, key or index, or several, as `0.2`.

    It need not be a tensor. Raises `LoweringError` if *output* has nothing of this name.
    """
    # A key with dots may be a single one.
    is_single = isinstance(key, int) or _has_key(output, key)
    steps: Sequence[str | int] = [key] if is_single else str(key).split(".")

    value = output
    for step in steps:
        if not _has_key(value, step):
            paths = ", ".join(path for path, _ in list_tensor_keys(output))
            problem = f"the network returns {_describe_output(output)}, without logits {key!r}; it has {paths}"
            raise LoweringError(problem, setting="logits_key", value=key)
        value = _look_up(value, step)
    return value


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

    A key chooses the tensor, as in `choose_output`; *path* is the key of *output* itself.
    Outputs can refer to themselves, so tensors in more than `DEPTH` + 2 containers are left out.
    """
    if isinstance(output, Tensor):
        # A symbolic size is that of the batch.
        sizes = [str(size) if isinstance(size, int) else "B" for size in output.shape]
        return [(path, f"({', '.join(sizes)})")]
    if path.count(".") > DEPTH:
        return []

    listed = []
    for key, value in _children(output):
        listed += list_tensor_keys(value, f"{path}.{key}" if path else key)
    return listed


def _children(output: Any) -> list[tuple[str, Any]]:
    """List (key, value) of what the container *output* holds; of another object, its attributes."""
    if isinstance(output, Mapping):
        return [(str(key), value) for key, value in output.items()]

    field_names = getattr(output, "_fields", None)  # of a named tuple
    if field_names is not None:
        return [(name, getattr(output, name)) for name in field_names]
    if isinstance(output, list | tuple):
        return [(str(index), value) for index, value in enumerate(output)]

    # A function or a module holds no outputs; some objects have no dict.
    attributes = {} if callable(output) else getattr(output, "__dict__", {})
    return [(name, getattr(output, name)) for name in attributes]


def _describe_output(output: Any) -> str:
    """Describe *output*, the return value of a network: its type with its keys, fields or length."""
    if isinstance(output, Mapping):
        return f"a dict with {', '.join(map(repr, output))}"
    field_names = getattr(output, "_fields", None)
    if field_names is not None:
        return f"a named tuple with {', '.join(field_names)}"
    length = f" of {len(output)}" if isinstance(output, list | tuple) else ""
    return f"a {type(output).__name__}{length}"


def generated_images(side: int) -> NDArray[np.uint8]:
    """Generate the images on which the file is compared, uint8 (4, side, side, 3), always the same ones."""
    random = np.random.default_rng(_SEED)

    # Ramps from left to right and from top to bottom, and a checkerboard with squares of 4 pixels.
    horizontal_ramp = np.tile(np.linspace(0, 255, side), (side, 1))
    square_of_pixel = np.arange(side) // 4  # the number of the square along either axis
    checkerboard = 255.0 * ((square_of_pixel[:, None] + square_of_pixel) % 2)
    patterns = np.stack([horizontal_ramp, horizontal_ramp.T, checkerboard], axis=2)

    # Noise, and enlarged noise, like a photo. The order of the draws decides the images.
    noise = random.integers(0, 256, (side, side, 3))
    size = min(side, CELLS)
    coarse = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
    scene = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))

    plain = np.broadcast_to((0, 255, 0), (side, side, 3))
    images = [patterns, noise, scene, plain]
    return np.stack([np.clip(np.rint(image), 0, 255).astype(np.uint8) for image in images])


def export_images(preprocess: Preprocess) -> dict[str, NDArray[np.uint8]]:
    """Make the images on which an export runs the network and its file, by what each is.

    Each is uint8 (side, side, 3). First come kinds of images that users have, because code of a
    network can treat bars, plain parts, dark or saturated images, and the finest patterns in its
    own way; then the images of `generated_images`. The order decides which run together and which alone
    (`runs.SIZES`): torch's fast path only runs if no image of a batch has bars on two sides.
    """
    side = preprocess.crop
    generated = generated_images(side)
    *_, scene, _plain = generated
    row, column = np.indices((side, side))[..., None]
    is_bar = abs(row - (side - 1) / 2) >= side / 4
    contrast = 4 * (scene.astype(np.int64) - 128) + 128

    images = {
        "a dark image": scene // 16,
        "a white image": np.full(1, 255),
        "a letterboxed image": np.where(is_bar, LETTERBOX, scene),
        "a checkerboard of single pixels": (row + column) % 2 * 255,
        "a half-plain image": np.where(column < side / 2, 255, scene),
        "a letterboxed image with the background of the bundle": np.where(
            is_bar, preprocess.background, scene[:, ::-1]
        ),
        "a saturated image": contrast.clip(0, 255),
        "a black image": np.zeros(1),
        "a gray image": np.full(1, LETTERBOX),
        **{f"reference image {number}": image for number, image in enumerate(generated)},
    }
    return {
        name: np.broadcast_to(image, (side, side, 3)).astype(np.uint8)
        for name, image in images.items()
    }


def evenly_spread(count: int, most: int) -> NDArray[np.int64]:
    """Choose at most *most* of the positions 0 to *count* - 1, evenly spread."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(np.int64)
