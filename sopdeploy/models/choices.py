"""The networks that `sopdeploy train --within` tries if none are named: `choices.toml`."""

import tomllib
from functools import cache
from importlib.resources import files
from typing import Annotated

import pydantic

from sopdeploy.config import Positive, StrictModel


class Choice(StrictModel):
    """A network of the list, with what its authors published.

    Attributes:
        name: The value of `model.name`.
        timm: The weights in timm, NAME.TAG.
        pixels: The side of its images; `resized` tells that it is not that of the weights.
        millions: Its parameters, in millions.
        top1: Its accuracy on ImageNet, in percent; None for weights that learned without labels.
    """

    name: str
    timm: str
    license: str
    pixels: int
    resized: bool = False
    millions: Positive
    top1: Positive | None = None


class Choices(StrictModel):
    """The networks, and the `source` of their accuracies and sizes."""

    source: str
    networks: Annotated[tuple[Choice, ...], pydantic.Field(min_length=1)]


@cache
def read_choices() -> Choices:
    """Read the list."""
    text = files("sopdeploy.models").joinpath("choices.toml").read_text(encoding="utf-8")
    return Choices(**tomllib.loads(text))


def file_stem(name: str) -> str:
    """Return how a file of weights of the network *name* is called, without its suffix: as in timm."""
    names = {choice.name: choice.timm for choice in read_choices().networks}
    return names.get(name, name.rpartition(":")[2])
