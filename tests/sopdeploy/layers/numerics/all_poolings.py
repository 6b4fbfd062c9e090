"""Every pooling, and both ways of those that have two, small enough for a test."""

import pydantic
import pytest

from sopdeploy.layers.pooling.base import GlobalPooling
from sopdeploy.layers.pooling.registry import Pooling

CHOICES = [
    "gap",
    {"kind": "flatten", "side": 2},
    "isqrt",
    {"kind": "isqrt", "width": 5, "iterations": 3, "prenorm": "frobenius", "compensation": "batch_norm"},
    {"kind": "isqrt", "compensation": "none"},
    {"kind": "isqrt", "width": 3, "reduction": "linear"},
    {"kind": "isqrt", "centered": False},
    "mpncov",
    {"kind": "mpncov", "width": 5},
    "deepo2p",
    "bcnn",
    "improved-bcnn",
    {"kind": "improved-bcnn", "root": "newton-schulz"},
    "g2denet",
    {"kind": "g2denet", "root": "newton-schulz"},
    {"kind": "cbp", "dim": 32},
    {"kind": "kernel", "dim": 16},
    {"kind": "low-rank-bilinear", "width": 5},
    {"kind": "netvlad", "words": 3},
    {"kind": "netfv", "words": 3},
]


def name(choice: str | dict[str, object]) -> str:
    return choice if isinstance(choice, str) else "-".join(str(value) for value in choice.values())


EACH_POOLING = pytest.mark.parametrize("choice", CHOICES, ids=name)


def build(choice: object, channels: int) -> GlobalPooling:
    return pydantic.TypeAdapter(Pooling).validate_python(choice).build(channels)
