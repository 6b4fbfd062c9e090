"""The transform of a training: a callable of the user, which turns an image into the network's input.

It takes what its library takes: a Pillow image (torchvision, timm, an image processor of Transformers), an
array (Albumentations, OpenCV) or a path. A Pillow image or an array is upright RGB, because turning and
converting an image is the work of a loader; with a path, all of it is the work of the transform.
"""

import inspect
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sopdeploy.errors import ConfigError, first_line
from sopdeploy.images.decode import decode_upright
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.options import Takes
from sopdeploy_export.pixels.photos import WIDE, draw_photo

_TO_RGB = "COLOR_BGR2RGB"  # OpenCV's name, in code that gets what `cv2.imread` returns
_SIDE = 224  # of the network for which the photo is drawn that a function is tried with
_PATH_NAMES = ("path", "file", "filename", "fname")
_LOADER = (
    Preprocess()
)  # of which only the decoding matters: all pixels, transparent ones on white
# Where libraries put the tensor in a dict
_KEYS = ("pixel_values", "image", "images")


class Transform:
    """*call*, which messages call *name*, as a function from the bytes of an image file to a tensor.

    `takes` says what it is given: by default what its library takes or, of a function, the first of a
    Pillow image, an array in RGB and a path that it accepts. A function without parameters returns the
    transform. Raises `ConfigError` if it accepts none of these.
    """

    def __init__(
        self, call: Callable[..., Any], name: str | None = None, takes: Takes | None = None
    ) -> None:
        self.name = name or _name_of(call)
        if not callable(call):
            raise ConfigError(
                f"is a {type(call).__name__}, not a callable",
                setting="transform",
                value=self.name,
            )
        if _takes_nothing(call):
            call = call()
        self.call = call
        self.library = _library_of(call)
        self.takes = takes or self._find_takes(draw_photo(WIDE, _SIDE))

    def __call__(self, content: bytes) -> Tensor:
        """Compute the network's input (C, H, W) float32 for the image file *content*; raises `ConfigError`."""
        try:
            return self._run(content, self.takes)
        except ConfigError:
            raise
        except Exception as error:  # the user's code
            raise ConfigError(
                f"fails for {_describe(content)} ({first_line(error)})",
                setting="transform",
                value=self.name,
            ) from error

    def _find_takes(self, sample: bytes) -> Takes:
        """Return what the transform takes: of a function, the first that it accepts."""
        if self.library == "albumentations":
            return "rgb"
        if self.library in ("torchvision", "timm", "transformers"):
            return "pillow"

        failures: dict[str, str] = {}
        for takes in _likely(self.call):
            try:
                self._run(sample, takes)
            except Exception as error:  # the user's code
                failures.setdefault(first_line(error), takes)
            else:
                return takes
        reasons = "; ".join(f"{takes}: {reason}" for reason, takes in failures.items())
        raise ConfigError(
            f"takes neither a Pillow image nor an array nor a path ({reasons}); mend it, or say what it takes",
            setting="transform",
            value=self.name,
            remedies={"transform_takes": "|".join(get_args(Takes))},
        )

    def _run(self, content: bytes, takes: Takes) -> Tensor:
        """Run the transform on the image file *content*, which it gets as what it *takes*."""
        with _given(content, takes) as image, torch.no_grad():
            if self.library == "albumentations":
                output = self.call(image=image)
            elif self.library == "transformers":
                output = self.call(images=image, return_tensors="pt")
            else:
                output = self.call(image)
            return _as_tensor(output)


def _name_of(call: Callable[..., Any]) -> str:
    """Return the name of a function or of the class of an object, with its module."""
    named = call if hasattr(call, "__qualname__") else type(call)
    return f"{named.__module__}:{named.__qualname__}"


def _takes_nothing(call: Callable[..., Any]) -> bool:
    """Tell whether *call* is a function without parameters, which builds a transform."""
    try:
        return inspect.isfunction(call) and not inspect.signature(call).parameters
    except (TypeError, ValueError):
        return False


def _library_of(call: Callable[..., Any]) -> str:
    """Return the package that defines the class of *call*; "builtins" of a function."""
    return type(call).__module__.partition(".")[0]


def _likely(call: Callable[..., Any]) -> Iterator[Takes]:
    """Yield what the function *call* may take, the most likely first, by its first parameter and its code."""
    array: Takes = "bgr" if _TO_RGB in set(_names_in(call)) else "rgb"
    try:
        first = next(iter(inspect.signature(call).parameters.values()))
    except (StopIteration, TypeError, ValueError):
        yield from ("pillow", array, "path")
        return

    annotation = str(getattr(first.annotation, "__name__", first.annotation)).lower()
    order: list[Takes] = ["pillow", array, "path"]
    if annotation in ("str", "path") or first.name.lower().endswith(_PATH_NAMES):
        order = ["path", "pillow", array]
    elif "ndarray" in annotation or "array" in annotation or array == "bgr":
        order = [array, "pillow", "path"]
    yield from order


def _names_in(call: Callable[..., Any]) -> Iterator[str]:
    """Yield the names that the code of the function *call* uses."""
    code = getattr(inspect.unwrap(call), "__code__", None)
    codes = [code] if isinstance(code, CodeType) else []
    while codes:
        code = codes.pop()
        yield from code.co_names
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


@contextmanager
def _given(content: bytes, takes: Takes) -> Iterator[Any]:
    """Give the image file *content* as what a transform *takes*."""
    if takes == "path":
        with TemporaryDirectory() as folder:
            suffix = ".png" if content.startswith(b"\x89PNG") else ".jpg"
            path = Path(folder) / f"photo{suffix}"
            path.write_bytes(content)
            yield str(path)
        return

    image = decode_upright(content, _LOADER)
    if takes == "pillow":
        yield image
    else:
        array = np.array(image)
        yield array if takes == "rgb" else np.ascontiguousarray(array[..., ::-1])


def _as_tensor(output: Any) -> Tensor:
    """Return the tensor (C, H, W) in *output*, what a transform returned; raises `TypeError` if there is none."""
    if isinstance(output, Mapping):
        key = next((key for key in _KEYS if key in output), None)
        if key is None:
            raise TypeError(f"returns a dict with {', '.join(map(str, output))}, and no image")
        output = output[key]
    if isinstance(output, list | tuple) and len(output) == 1:
        output = output[0]
    if isinstance(output, np.ndarray):
        output = torch.from_numpy(output)
    if not isinstance(output, Tensor):
        raise TypeError(f"returns a {type(output).__name__}, not a tensor")

    tensor = output.as_subclass(Tensor).detach().cpu()
    if tensor.ndim == 4 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim == 3 and tensor.shape[0] not in (1, 3) and tensor.shape[2] in (1, 3):
        tensor = tensor.permute(2, 0, 1)
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise TypeError(f"returns a tensor of the shape {tuple(output.shape)}, not (3, S, S)")
    return tensor.float().contiguous()


def _describe(content: bytes) -> str:
    """Describe the image file *content* by its size and mode."""
    with Image.open(io.BytesIO(content)) as image:
        return f"an image of {image.width} x {image.height} pixels ({image.mode})"
