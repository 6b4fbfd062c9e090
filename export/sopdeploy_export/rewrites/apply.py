"""Apply the rewrite rules to an ONNX graph, and replay their applications.

The certificate covers one ONNX graph. Each application of a rule names the rule, the operator where the
pattern ends or starts, and the chosen form, so the list of applications turns the root of the certified graph
into the root of the lowered one. `replay` repeats them: a rule that does not match any more is an error.

If several equivalent forms exist, the default is a fixed heuristic, so exports are reproducible. `fastest`
chooses by timing: the operators between the inputs and the result of an application run alone, in turn, on
one thread, at batch 1 and at the usual batch size. Process time is measured, which other load affects least.
"""

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
import onnx.utils
import onnx_ir as ir
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.config import StrictModel
from sopdeploy.errors import LoweringError
from sopdeploy_export.onnx_graph import Graph
from sopdeploy_export.rewrites import linear, mixture, newton_schulz
from sopdeploy_export.rewrites.rule import Rule

RUNS, WARMUPS = 15, 3
RULES = {
    rule.name: rule
    for rule in (
        Rule(linear.COPY, linear.contiguous_copy),
        Rule(linear.POSITIONS, linear.gather_pairs),
        Rule(linear.CENTERING, linear.center_by_mean),
        Rule(newton_schulz.NAME, newton_schulz.apply),
        Rule(
            mixture.NAME,
            mixture.apply,
            mixture.FORMS,
            lambda batch: mixture.WEIGHTS if batch <= mixture.GATHER_UP_TO else mixture.ACTIVATIONS,
        ),
        Rule(mixture.TRIANGLE, mixture.sum_in_one_product),
        Rule(linear.COMPENSATION, linear.move_compensation),
        Rule(linear.FUSION_NORM, linear.fold_fusion_norm),
        Rule(
            linear.ROWS,
            linear.fold_rows,
            linear.ROW_FORMS,
            lambda batch: linear.PRODUCT if batch >= linear.PRODUCT_FROM else linear.CONVOLUTION,
        ),
    )
}


class Application(StrictModel):
    """One application of a rule.

    Attributes:
        name: The rule.
        where: The part of the network, or the replaced value if no part is known.
        precondition: What the structure of the graph shows.
        effect: What changes.
        node: The result of the operator at which the rule matched.
        form: The chosen form; empty if the rule has one only.
        value: The replaced value, which keeps its name.
        reads: The values that the replacement reads.
        removed: The results of the operators that were removed.
        added: The number of new operators of each type.
    """

    name: str
    where: str
    precondition: str
    effect: str
    node: str
    form: str
    value: str
    reads: tuple[str, ...]
    removed: tuple[str, ...]
    added: dict[str, int]


class Choice(StrictModel):
    """The form that was chosen for the part *where* from the forms *among*.

    *by* is "rule of thumb" or "autotune". Timings are not stored, so that two exports write the same bytes.
    """

    where: str
    form: str
    among: tuple[str, ...]
    by: str


class LoweringReport(StrictModel):
    """The content of `lowering.json`.

    Attributes:
        rules: The applications, in order; empty with `--no-lowering`.
        choices: The forms that were chosen.
        certified_root: Root of the program that the certificate covers.
        source_onnx_root: Root of the ONNX graph that the rules were applied to. It is the certified one,
            unless the network was converted to fp16 or bf16 before its conversion to ONNX.
        lowered_onnx_root: Root of the ONNX graph that the rules made. It is the exported one, unless its
            convolutions were quantized afterwards.
    """

    rules: tuple[Application, ...]
    choices: tuple[Choice, ...]
    certified_root: str
    source_onnx_root: str
    lowered_onnx_root: str

    @property
    def summary(self) -> dict[str, int]:
        """Number of applications of each rule, in the order of application."""
        return dict(Counter(rule.name for rule in self.rules))


class Lowered(NamedTuple):
    """The lowered graph, the applications that made it, and its choices of forms."""

    model: onnx.ModelProto
    rules: tuple[Application, ...]
    choices: tuple[Choice, ...] = ()


def apply_rule(
    graph: Graph, rule: Rule, node: ir.Node, forms: Sequence[str], where: Mapping[str, str]
) -> Application | None:
    """Apply *rule* at *node*, in the first of *forms* that exists there."""
    name, before = str(node.outputs[0].name), set(graph.made)
    for form in forms:
        found = rule.apply(graph, node, form)
        if found is not None:
            removed = graph.remove_unused()
            graph.infer_shapes()
            return Application(
                name=rule.name,
                where=where.get(found.value, found.value),
                precondition=found.precondition,
                effect=found.effect,
                node=name,
                form=form,
                value=found.value,
                reads=found.reads,
                removed=tuple(removed),
                added=dict(sorted(Counter(new.op_type for new in graph.made - before).items())),
            )
    return None


def lower_graph(
    model: onnx.ModelProto,
    batch: int = 1,
    forms: Mapping[str, str] | None = None,
    where: Mapping[str, str] | None = None,
) -> Lowered:
    """Apply every rule wherever it matches.

    *batch* is the usual batch size, for the default forms; *forms* maps operators to other forms, by the name
    of their result; *where* maps values to parts of the network, for the report.
    """
    graph, applied, choices = Graph(model), [], []
    for rule in RULES.values():
        for node in graph.nodes():
            if node.graph is None:  # removed by an application
                continue
            wanted = (forms or {}).get(str(node.outputs[0].name))
            start = rule.forms.index(wanted if wanted in rule.forms else rule.default(batch))
            given = rule.forms[start:]
            found = apply_rule(graph, rule, node, given, where or {})
            if found is not None:
                applied.append(found)
                if len(rule.forms) > 1:
                    choices.append(
                        Choice(where=found.where, form=found.form, among=rule.forms, by="rule of thumb")
                    )
    return Lowered(graph.to_proto() if applied else model, tuple(applied), tuple(choices))


def replay(model: onnx.ModelProto, applications: Sequence[Application]) -> onnx.ModelProto:
    """Apply *applications* to *model*; raise `LoweringError` if one of them does not match."""
    graph = Graph(model)
    for step in applications:
        rule = RULES.get(step.name)
        node = next((node for node in graph.nodes() if node.outputs[0].name == step.node), None)
        known = rule is not None and node is not None and step.form in rule.forms
        if not known or apply_rule(graph, rule, node, (step.form,), {}) is None:
            raise LoweringError(f"rule {step.name!r} does not match at {step.node}")
    return graph.to_proto()


def autotune(
    model: onnx.ModelProto,
    images: NDArray[np.uint8],
    batch: BatchRange,
    where: Mapping[str, str] | None = None,
) -> Lowered:
    """Apply every rule, and choose among equivalent forms by timing them on *images* (P, H, W, 3)."""
    lowered, forms = lower_graph(model, batch.optimum, where=where), {}
    for step in [rule for rule in lowered.rules if len(RULES[rule.name].forms) > 1]:
        graphs = {
            form: lower_graph(model, batch.optimum, {**forms, step.node: form}).model
            for form in RULES[step.name].forms
        }
        forms[step.node] = fastest(model, graphs, step, images, batch)
    tuned = lower_graph(model, batch.optimum, forms, where)
    places = {step.node: step for step in lowered.rules}
    choices = tuple(
        Choice(where=places[node].where, form=form, among=RULES[places[node].name].forms, by="autotune")
        for node, form in forms.items()
    )
    return Lowered(tuned.model, tuned.rules, choices)


def fastest(
    model: onnx.ModelProto,
    graphs: Mapping[str, onnx.ModelProto],
    step: Application,
    images: NDArray[np.uint8],
    batch: BatchRange,
) -> str:
    """Return the form of *step* with the smallest product of its median times over the batch sizes."""
    import onnxruntime as ort  # noqa: PLC0415 # a replay does not need it

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1

    def open_part(
        graph: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str]
    ) -> ort.InferenceSession:
        part = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(graph)).extract_model(
            list(inputs), list(outputs)
        )
        return ort.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])

    source = model.graph.input[0].name
    values = open_part(model, [source], step.reads).run(None, {source: images})
    sessions = {form: open_part(graph, step.reads, [step.value]) for form, graph in graphs.items()}
    scores = dict.fromkeys(sessions, 1.0)
    for size in sorted({1, batch.optimum}):
        feeds = {
            name: array[np.arange(size) % len(array)] for name, array in zip(step.reads, values, strict=True)
        }
        seconds: dict[str, list[float]] = {form: [] for form in sessions}
        for run in range(WARMUPS + RUNS):
            for form, session in sessions.items():
                start = time.process_time()
                session.run(None, feeds)
                if run >= WARMUPS:
                    seconds[form].append(time.process_time() - start)
        for form, taken in seconds.items():
            scores[form] *= statistics.median(taken)
    return min(scores, key=lambda form: scores[form])
