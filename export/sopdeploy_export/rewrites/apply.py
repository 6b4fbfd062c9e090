"""Apply the rewrite rules to an ONNX graph, and replay their applications.

Each application names the rule and the operator at which its pattern ends or starts, so the list turns the
root of the certified graph into that of the lowered one. `replay` repeats it: a rule that does not match any
more is an error.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import onnx
import onnx_ir as ir

from sopdeploy.config import StrictModel
from sopdeploy.errors import LoweringError
from sopdeploy_export.onnx_graph import Graph, name_of
from sopdeploy_export.rewrites import linear, mixture, newton_schulz

# A rule rewrites what matches at an operator; it returns the precondition and the effect, or None.
Rule = Callable[[Graph, ir.Node], tuple[str, str] | None]
RULES: dict[str, Rule] = {
    linear.EINSUM: linear.einsum_as_product,
    linear.CENTERING: linear.center_by_mean,
    newton_schulz.NAME: newton_schulz.apply,
    mixture.NAME: mixture.apply,
}


class Application(StrictModel):
    """One application of a rule.

    Attributes:
        name: The rule.
        where: The part of the network, or the operator's result if no part is known.
        precondition: What the structure of the graph shows.
        effect: What changes.
        node: The result of the operator at which the rule matched.
        removed: The results of the operators that were removed.
        added: The number of new operators of each type.
    """

    name: str
    where: str
    precondition: str
    effect: str
    node: str
    removed: tuple[str, ...]
    added: dict[str, int]


class LoweringReport(StrictModel):
    """The content of `lowering.json`.

    Attributes:
        rules: The applications, in order; empty with `--no-lowering`.
        certified_root: Root of the program that the certificate covers.
        source_onnx_root: Root of the ONNX graph that the rules were applied to. It is the certified one,
            unless the network was converted to fp16 or bf16 before its conversion to ONNX.
        lowered_onnx_root: Root of the ONNX graph that the rules made. It is the exported one, unless its
            convolutions were quantized afterwards.
    """

    rules: tuple[Application, ...]
    certified_root: str
    source_onnx_root: str
    lowered_onnx_root: str

    @property
    def summary(self) -> dict[str, int]:
        """Number of applications of each rule, in the order of application."""
        return dict(Counter(rule.name for rule in self.rules))


class Lowered(NamedTuple):
    """The lowered graph, and the applications that made it."""

    model: onnx.ModelProto
    rules: tuple[Application, ...]


def apply_rule(graph: Graph, name: str, node: ir.Node) -> Application | None:
    """Apply rule *name* at *node*; None if it does not match."""
    result, before = name_of(node), set(graph.made)
    applied = RULES[name](graph, node)
    if applied is None:
        return None
    removed = graph.remove_unused()
    graph.infer_shapes()
    return Application(
        name=name,
        where=node.metadata_props.get("part", result),
        precondition=applied[0],
        effect=applied[1],
        node=result,
        removed=tuple(removed),
        added=dict(sorted(Counter(new.op_type for new in graph.made - before).items())),
    )


def lower_graph(model: onnx.ModelProto) -> Lowered:
    """Apply every rule wherever it matches."""
    graph, applied = Graph(model), []
    for name in RULES:
        for node in graph.nodes():
            removed = node.graph is None
            application = None if removed else apply_rule(graph, name, node)
            if application is not None:
                applied.append(application)
    return Lowered(graph.to_proto() if applied else model, tuple(applied))


def replay(model: onnx.ModelProto, applications: Sequence[Application]) -> onnx.ModelProto:
    """Apply *applications* to *model*; raise `LoweringError` if one of them does not match."""
    graph = Graph(model)
    for step in applications:
        node = next((node for node in graph.nodes() if name_of(node) == step.node), None)
        if node is None or step.name not in RULES or apply_rule(graph, step.name, node) is None:
            raise LoweringError(f"rule {step.name!r} does not match at {step.node}")
    return graph.to_proto()
