"""Apply the rewrite rules to an ONNX graph, and replay their applications.

A rule proposes a new value. It is used only if `equivalence`, which knows no rule, finds no difference
between the part of the graph that computes the old value and the part that computes the new one. Otherwise
the graph stays as it is, and the report says so.

Each application names the rule and the operator at which its pattern ends or starts, so the list turns the
root of the certified graph into that of the lowered one. `replay` repeats it: a rule that does not match any
more, or that changes a result, is an error.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import onnx
import onnx_ir as ir

from sopdeploy.config import StrictModel
from sopdeploy.errors import LoweringError
from sopdeploy_export.equivalence import difference
from sopdeploy_export.onnx_graph import Graph, Rewrite, name_of
from sopdeploy_export.rewrites import linear, mixture, newton_schulz

Rule = Callable[[Graph, ir.Node], Rewrite | None]  # what it proposes where it matches at an operator
RULES: dict[str, Rule] = {
    linear.EINSUM: linear.einsum_as_product,
    newton_schulz.NEWTON_SCHULZ: newton_schulz.shorten_loop,
    mixture.EXPERTS: mixture.choose_experts,
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


class Refused(StrictModel):
    """An application of the rule *name* that was not used, because of a *difference* of the results."""

    name: str
    where: str
    difference: str

    def __str__(self) -> str:
        return f"{self.name} at {self.where}, {self.difference}"


class LoweringReport(StrictModel):
    """The content of `lowering.json`.

    Attributes:
        rules: The applications, in order; empty with `--no-lowering`.
        refused: The applications that would change results.
        certified_root: Root of the program that the certificate covers.
        source_onnx_root: Root of the ONNX graph that the rules were applied to. It is the certified one,
            unless the network was converted to fp16 or bf16 before its conversion to ONNX.
        lowered_onnx_root: Root of the ONNX graph that the rules made. It is the exported one, unless its
            convolutions were quantized afterwards.
    """

    rules: tuple[Application, ...]
    refused: tuple[Refused, ...] = ()
    certified_root: str
    source_onnx_root: str
    lowered_onnx_root: str

    @property
    def summary(self) -> dict[str, int]:
        """Number of applications of each rule, in the order of application."""
        return dict(Counter(rule.name for rule in self.rules))


class Lowered(NamedTuple):
    """The lowered graph, the applications that made it, and those that would change results."""

    model: onnx.ModelProto
    rules: tuple[Application, ...] = ()
    refused: tuple[Refused, ...] = ()


def apply_rule(graph: Graph, name: str, node: ir.Node) -> Application | Refused | None:
    """Apply rule *name* at *node*; None if it does not match."""
    result, before = name_of(node), set(graph.made)
    where = node.metadata_props.get("part", result)
    rewrite = RULES[name](graph, node)
    problem = None if rewrite is None else _check(graph, rewrite)
    if rewrite is None or problem is not None:
        graph.remove_unused()  # what the rule has built
        return None if problem is None else Refused(name=name, where=where, difference=problem)
    graph.replace(rewrite.old, rewrite.new)
    removed = graph.remove_unused()
    graph.infer_shapes()
    return Application(
        name=name,
        where=where,
        precondition=rewrite.precondition,
        effect=rewrite.effect,
        node=result,
        removed=tuple(removed),
        added=dict(sorted(Counter(new.op_type for new in graph.made - before).items())),
    )


def _check(graph: Graph, rewrite: Rewrite) -> str | None:
    """Describe how *rewrite* would change results; None if it does not."""
    try:
        return difference(*graph.regions(rewrite))
    except LoweringError as error:
        return str(error)


def lower_graph(model: onnx.ModelProto) -> Lowered:
    """Apply every rule wherever it matches and changes no result."""
    graph, applied, refused = Graph(model), [], []
    for name in RULES:
        for node in graph.nodes():
            removed = node.graph is None
            application = None if removed else apply_rule(graph, name, node)
            if isinstance(application, Application):
                applied.append(application)
            elif application is not None:
                refused.append(application)
    return Lowered(graph.to_proto() if applied else model, tuple(applied), tuple(refused))


def reapply(model: onnx.ModelProto, applications: Sequence[Application]) -> onnx.ModelProto:
    """Apply *applications* to *model*; raise `LoweringError` if one does not match or changes a result."""
    graph = Graph(model)
    for step in applications:
        node = next((node for node in graph.nodes() if name_of(node) == step.node), None)
        repeated = None if node is None or step.name not in RULES else apply_rule(graph, step.name, node)
        if repeated is None:
            raise LoweringError(f"rule {step.name!r} does not match at {step.node}")
        if isinstance(repeated, Refused):
            raise LoweringError(f"rule {step.name!r} changes results at {step.node}: {repeated.difference}")
    return graph.to_proto()
