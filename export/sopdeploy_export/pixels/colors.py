"""Mean, standard deviation and order of colors of any transform, measured on images of one color.

Resizing does not change such an image, so the tensor of a black one is -mean / std, and that of a white one
(1 - mean) / std, whatever else the transform does.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import GRAY_WEIGHTS
from sopdeploy_export.pixels.photos import draw_plain
from sopdeploy_export.pixels.transform import Transform

_SIDE = 224  # of half a plain image
_LEVEL = 128
_PLAIN = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
# Of the range of values: how far a plain image may be from plain, and a level from the line between
# black and white
_TOLERANCE = 0.01
_DIGITS = (3, 4, 5, 6)  # of decimals, of which the fewest that are exact are kept
_EXACT = 3e-6


class Colors(NamedTuple):
    """What a transform does to the values of pixels: its mean and std (C,), and its order of colors."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: Literal["RGB", "BGR"] = "RGB"

    @property
    def channels(self) -> Literal[1, 3]:
        """The number of channels."""
        return 1 if len(self.mean) == 1 else 3

    def to_levels(self, tensor: Tensor) -> NDArray[np.float32]:
        """Return the pixels, 0 to 255, that *tensor* (C, H, W) was made of: (H, W, C) in the order of RGB."""
        mean = torch.tensor(self.mean)[:, None, None]
        std = torch.tensor(self.std)[:, None, None]
        levels = (tensor * std + mean) * 255
        if self.order == "BGR":
            levels = levels.flip(0)
        return levels.permute(1, 2, 0).numpy()


def measure_colors(transform: Transform) -> Colors:
    """Measure the colors of *transform*.

    Raises `ConfigError` if no rules can say what it does to the values of pixels; the message names it.
    """
    black = _run(transform, (0, 0, 0))
    white = _run(transform, (255, 255, 255))
    span = white - black
    if not bool((span > 0).all()) or not bool(span.isfinite().all()):
        raise _no_rules(
            transform,
            "gives black and white images the same values, as normalizing each image does",
        )

    middle = (_run(transform, (_LEVEL,) * 3) - black) / span
    if float((middle - _LEVEL / 255).abs().max()) > _TOLERANCE:
        raise _no_rules(transform, "changes the values of pixels by a curve, such as a gamma")

    # How much of each channel a pure color gives.
    shares = torch.stack(
        [(_run(transform, color) - black) / span for color in _PLAIN.values()], 1
    )
    order = _find_order(transform, shares)
    std = 1 / span.double()
    mean = -black.double() * std
    return Colors(_shorten(mean), _shorten(std, least=0), order)


def _run(transform: Transform, color: tuple[int, int, int]) -> Tensor:
    """Return the values (C,) that *transform* gives an image of one *color*."""
    tensor = transform(draw_plain(color, _SIDE))
    height, width = tensor.shape[1:]
    return tensor[:, height // 2, width // 2]


def _find_order(transform: Transform, shares: Tensor) -> Literal["RGB", "BGR"]:
    """Return the order of the channels, of which red, green and blue images have the *shares* (C, 3)."""
    if len(shares) == 1:
        if bool(((shares - torch.tensor([GRAY_WEIGHTS])).abs() > _TOLERANCE).any()):
            weights = ", ".join(f"{share:.3g}" for share in shares[0].tolist())
            raise _no_rules(
                transform,
                f"makes images gray with the weights {weights}, not {', '.join(map(str, GRAY_WEIGHTS))}",
            )
        return "RGB"

    identity = torch.eye(3)
    if bool(((shares - identity).abs() < _TOLERANCE).all()):
        return "RGB"
    if bool(((shares - identity.flip(0)).abs() < _TOLERANCE).all()):
        return "BGR"
    if bool(((shares - shares[:1]).abs() < _TOLERANCE).all()):
        raise _no_rules(transform, "makes three equal channels of a gray image (Grayscale)")
    raise _no_rules(transform, "mixes the colors")


def _no_rules(transform: Transform, problem: str) -> ConfigError:
    return ConfigError(
        f"{problem}; no preprocessing rules can say that, so remove the step or put it into the network",
        setting="transform",
        value=transform.name,
    )


def _shorten(values: Tensor, least: float = 1) -> tuple[float, ...]:
    """Return *values* with the fewest decimals that are exact within the error of float32.

    The error is a share of the value, or of *least* if the value is smaller.
    """
    return tuple(
        next(
            (
                round(value, digits) + 0.0  # without the sign of zero
                for digits in _DIGITS
                if abs(round(value, digits) - value) <= _EXACT * max(least, abs(value))
            ),
            value,
        )
        for value in values.tolist()
    )
