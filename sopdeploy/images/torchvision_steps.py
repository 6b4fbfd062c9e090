"""Read preprocessing rules from the steps of torchvision's `Compose`, with timm's steps in it.

Nothing is imported from these packages: a step is known by the name of its class and by its attributes.
"""

from collections.abc import Callable, Iterator
from typing import Any

from sopdeploy.errors import ConfigError

# Steps that turn an image into a tensor, and change no pixel
_TO_TENSOR = {
    *("ToTensor", "ToImage", "PILToTensor", "ToDtype", "ConvertImageDtype", "ToPureTensor"),
    *("MaybeToTensor", "MaybePILToTensor", "ToNumpy"),
}
_LONGEST = 1.0  # of timm's `ResizeKeepRatio`: the longer side gets the size
Fields = dict[str, Any]


def read_steps(compose: Any) -> Fields:
    """Return the fields of `Preprocess` that the steps of *compose*, a `Compose` or `Sequential`, say.

    Raises `ConfigError` for a step that rules cannot say, which it names, and if no square comes out.
    """
    fields: Fields = {"mean": (0.0,), "std": (1.0,)}
    is_tensor = False

    for step in _flatten(compose):
        name = type(step).__name__
        if name in _TO_TENSOR:
            is_tensor = True
        elif name in _READERS:
            _READERS[name](step, fields, is_tensor)
        else:
            raise ConfigError(f"torchvision: preprocessing rules cannot say the step {name}")

    if "crop" not in fields:
        raise ConfigError(
            "torchvision: does not resize to a square; add Resize and CenterCrop, or Resize with two sides"
        )
    fields.pop("square", None)
    return fields


def _flatten(compose: Any) -> Iterator[Any]:
    """Yield the steps of *compose*, also those of a `Compose` or `Sequential` in it."""
    steps = getattr(compose, "transforms", None)
    if steps is None and type(compose).__name__ == "Sequential":
        steps = list(compose)
    if steps is None:
        yield compose
        return
    for step in steps:
        yield from _flatten(step)


def _read_resize(step: Any, fields: Fields, is_tensor: bool) -> None:
    """Read a `Resize` to one side, which the shorter one gets, or to two equal ones."""
    size = [step.size] if isinstance(step.size, int) else list(step.size)
    if len(set(size)) != 1 or getattr(step, "max_size", None) is not None or "resize" in fields:
        raise ConfigError(f"torchvision: preprocessing rules cannot say {step}")
    fields["resize"] = size[0]
    fields["interpolation"] = _interpolation_of(step)
    if is_tensor and getattr(step, "antialias", True) is False:  # Pillow always antialiases
        fields["antialias"] = False
    if len(size) == 2:
        fields |= {"fit": "squash", "crop": size[0]}


def _read_center_crop(step: Any, fields: Fields, is_tensor: bool) -> None:  # noqa: ARG001
    """Read a `CenterCrop`, or timm's `CenterCropOrPad` behind a longer side that has its size."""
    size = [step.size] if isinstance(step.size, int) else list(step.size)
    resize = fields.get("resize")
    if len(set(size)) != 1 or resize is None or size[0] > resize:
        raise ConfigError(f"torchvision: preprocessing rules cannot say {step}")
    if fields.get("fit") == "squash" and size[0] < resize:
        fields["fit"] = "squash-crop"
    if fields.get("fit") == "pad":
        fill = getattr(step, "fill", 0)
        fill = (fill,) * 3 if isinstance(fill, int | float) else tuple(fill)
        fields["background"] = tuple(round(value) for value in fill)
    fields["crop"] = size[0]


def _read_keep_ratio(step: Any, fields: Fields, is_tensor: bool) -> None:  # noqa: ARG001
    """Read timm's `ResizeKeepRatio`, whose longer side gets the size."""
    if len(set(step.size)) != 1 or step.longest != _LONGEST:
        raise ConfigError(f"torchvision: preprocessing rules cannot say {step}")
    side = step.size[0]
    fields |= {"fit": "pad", "resize": side, "interpolation": _interpolation_of(step)}


def _read_normalize(step: Any, fields: Fields, is_tensor: bool) -> None:  # noqa: ARG001
    """Read mean and standard deviation, which may be tensors."""
    for name in ("mean", "std"):
        values = getattr(step, name)
        values = values.tolist() if hasattr(values, "tolist") else values
        fields[name] = tuple(round(float(value), 6) for value in values)


def _read_grayscale(step: Any, fields: Fields, is_tensor: bool) -> None:  # noqa: ARG001
    """Read a `Grayscale` to one channel."""
    if step.num_output_channels != 1:
        raise ConfigError(f"torchvision: preprocessing rules cannot say {step}")
    fields["channels"] = 1


def _interpolation_of(step: Any) -> str:
    """Return the name of the interpolation of *step*, an enumeration, a list of one, or a text."""
    interpolation = step.interpolation
    if isinstance(interpolation, list | tuple) and len(interpolation) == 1:
        interpolation = interpolation[0]
    return str(getattr(interpolation, "value", interpolation))


_READERS: dict[str, Callable[[Any, Fields, bool], None]] = {
    "Resize": _read_resize,
    "CenterCrop": _read_center_crop,
    "CenterCropOrPad": _read_center_crop,
    "ResizeKeepRatio": _read_keep_ratio,
    "Normalize": _read_normalize,
    "Grayscale": _read_grayscale,
}
