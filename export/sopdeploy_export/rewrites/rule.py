"""What a rewrite rule is."""

from collections.abc import Callable
from typing import NamedTuple

import onnx_ir as ir

from sopdeploy_export.onnx_graph import Graph


class Finding(NamedTuple):
    """What a rule found: the replaced value, the precondition, the effect, and the values it reads."""

    value: str
    precondition: str
    effect: str
    reads: tuple[str, ...] = ()


class Rule(NamedTuple):
    """A rule: *apply* rewrites the pattern that ends in a node to one of the *forms*, or returns None."""

    name: str
    apply: Callable[[Graph, ir.Node, str], Finding | None]
    forms: tuple[str, ...] = ("",)
    default: Callable[[int], str] = lambda _: ""
