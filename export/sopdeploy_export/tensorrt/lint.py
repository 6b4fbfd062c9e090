"""The hazard lint: what this TensorRT would read wrongly is rewritten exactly, or the build is refused.

The dangerous hazards are those where nothing fails: the engine builds, runs and answers, from another
network. So the lint runs before every build, knows the release, and the probes run after it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from sopdeploy.errors import EngineError, LoweringError
from sopdeploy.tensorrt.binding import Version
from sopdeploy.tensorrt.profiles import Profile
from sopdeploy.tensorrt.record import Hazard
from sopdeploy_export.tensorrt.rewrites import (
    array,
    axes_as_attributes,
    constants,
    graph_precision,
    value_types,
    widen_bytes_first,
)

NEWEST_OPSET = {
    (8, 6): 17,
    (10, 0): 20,
    (10, 15): 24,
    (11, 0): 25,
}  # of the release and those after it, until the next
LARGEST_K = 3840
INT32 = (-(2**31), 2**31 - 1)
ALL: Version = (8, 6)
EXPORT_INT8 = "export again with --precision int8 --int8-for tensorrt"


@dataclass(frozen=True)
class GraphView:
    """A graph with what the rules look up in it."""

    model: onnx.ModelProto
    version: Version
    fixed: Mapping[str, onnx.TensorProto]
    types: Mapping[str, int]

    def nodes(self, *operators: str) -> Iterator[onnx.NodeProto]:
        """Yield the nodes of *operators*."""
        return (node for node in self.model.graph.node if node.op_type in operators)


Rule = Callable[[GraphView], "str | None"]


def look_at(model: onnx.ModelProto, version: Version) -> GraphView:
    """Return *model* as the rules see it."""
    return GraphView(model=model, version=version, fixed=constants(model), types=value_types(model))


def newer_opset(model: onnx.ModelProto, version: Version) -> str | None:
    """Say where *model*, rewritten, still has a newer opset than *version* reads rightly.

    The parser of 8.6 has no upper bound and reads newer operators as if they were old.
    """
    newest = next(NEWEST_OPSET[start] for start in sorted(NEWEST_OPSET, reverse=True) if version >= start)
    found = max(entry.version for entry in model.opset_import if entry.domain == "")
    return f"(newer-opset): opset {found} is newer than {newest}" if found > newest else None


def other_domains(seen: GraphView) -> str | None:
    """Operators of other domains are plugins, found or not found by name."""
    domains = sorted({node.domain for node in seen.model.graph.node if node.domain not in {"", "ai.onnx"}})
    return f"operators of the domain {domains[0]} would need a plugin" if domains else None


def computed_axes(seen: GraphView) -> str | None:
    """Axes of a reduction must be a constant."""
    for node in seen.model.graph.node:
        if node.op_type.startswith("Reduce") and len(node.input) > 1 and node.input[1] not in seen.fixed:
            return f"{node.name}: the axes of {node.op_type} are computed, it needs a constant"
    return None


def control_flow(seen: GraphView) -> str | None:
    """Branches and loops stop fusion and CUDA graphs, and no network here needs them."""
    found = next(seen.nodes("If", "Loop", "Scan", "NonZero"), None)
    return f"{found.name}: {found.op_type} makes shapes depend on data" if found else None


def unknown_operators(seen: GraphView) -> str | None:
    """Det has no form in TensorRT."""
    found = next(seen.nodes("Det"), None)
    return f"{found.name}: {found.op_type} is not supported" if found else None


def double(seen: GraphView) -> str | None:
    """Doubles are silently computed as floats."""
    name = next((name for name, kind in seen.types.items() if kind == TensorProto.DOUBLE), None)
    return f"{name} is a double, which it silently computes as float" if name else None


def bfloat(seen: GraphView) -> str | None:
    """bfloat16 exists from TensorRT 10 on."""
    name = next((name for name, kind in seen.types.items() if kind == TensorProto.BFLOAT16), None)
    return f"{name} is bfloat16, which exists from TensorRT 10 on: export with fp16 or fp32" if name else None


def long_integers(seen: GraphView) -> str | None:
    """8.6 casts int64 constants to int32 and cuts off what does not fit."""
    for name, tensor in seen.fixed.items():
        values = array(tensor) if tensor.data_type == TensorProto.INT64 else None
        if values is None or not values.size or (INT32[0] <= values.min() and values.max() <= INT32[1]):
            continue
        users = {node.op_type for node in seen.model.graph.node if name in node.input}
        if users != {"Slice"}:  # whose end may lie anywhere behind the last element
            return f"{name} does not fit into 32 bits, and it silently cuts it off"
    return None


def top_k(seen: GraphView) -> str | None:
    """K must be a constant, and small."""
    for node in seen.nodes("TopK"):
        if node.input[1] not in seen.fixed:
            return f"{node.name}: k of TopK is computed, it needs a constant"
        k = int(array(seen.fixed[node.input[1]]).reshape(-1)[0])
        if k > LARGEST_K:
            return f"{node.name}: TopK of {k}, at most {LARGEST_K} are supported"
    return None


def scatter_reduction(seen: GraphView) -> str | None:
    """ScatterND's reduction is not supported; without it the graph would overwrite instead of add."""
    for node in seen.nodes("ScatterND"):
        if any(a.name == "reduction" and a.s not in {b"", b"none"} for a in node.attribute):
            return f"{node.name}: ScatterND with a reduction is not supported"
    return None


def einsum(seen: GraphView) -> str | None:
    """Ellipsis and diagonals in Einsum exist from 10.12 on."""
    for node in seen.nodes("Einsum"):
        equation = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
        terms = equation.partition("->")[0].split(",")
        if "..." in equation or any(len(set(term)) < len(term) for term in terms):
            return f"{node.name}: Einsum {equation} needs TensorRT 10.12; write it as MatMul"
    return None


def old_normalization(seen: GraphView) -> str | None:
    """8.6 makes GroupNormalization a plugin that calls cuDNN."""
    found = next(seen.nodes("GroupNormalization"), None)
    return f"{found.name}: GroupNormalization would be a plugin over cuDNN 8" if found else None


def quantised_for_a_cpu(seen: GraphView) -> str | None:
    """CPUs are faster with unsigned bytes, a zero point and biases in 32 bits.

    TensorRT dequantises signed bytes around zero and nothing else: a bias in int32 stops the parser, a zero
    point too, and unsigned bytes it reads as signed.
    """
    for node in seen.nodes("QuantizeLinear", "DequantizeLinear"):
        if not around_zero(seen, node):
            return (
                f"{node.name}: is quantised as CPUs like it; it needs signed bytes around zero: {EXPORT_INT8}"
            )
    return None


def around_zero(seen: GraphView, node: onnx.NodeProto) -> bool:
    """Say whether *node* quantises to, or from, signed bytes around zero."""
    name = node.input[2] if len(node.input) > 2 else ""
    if not name:  # then the type is that of the codes, and for QuantizeLinear unsigned
        codes = node.input[0] if node.op_type == "DequantizeLinear" else node.output[0]
        return seen.types.get(codes) == TensorProto.INT8
    point = seen.fixed.get(name)
    return point is not None and point.data_type == TensorProto.INT8 and not array(point).any()


# Asked before anything is rewritten: name, rule, the release from which on and the one up to which it holds.
RULES: tuple[tuple[str, Rule, Version, Version | None], ...] = (
    ("other-domain", other_domains, ALL, None),
    ("computed-axes", computed_axes, ALL, None),
    ("control-flow", control_flow, ALL, None),
    ("unknown-operator", unknown_operators, ALL, None),
    ("double", double, ALL, None),
    ("bfloat16", bfloat, ALL, (10, 0)),
    ("int64-constant", long_integers, ALL, (10, 0)),
    ("top-k", top_k, ALL, None),
    ("scatter-reduction", scatter_reduction, ALL, None),
    ("einsum", einsum, ALL, (10, 12)),
    ("quantised-for-a-cpu", quantised_for_a_cpu, ALL, None),
    ("group-normalization", old_normalization, ALL, (10, 0)),
)


def complaints(seen: GraphView) -> Iterator[str]:
    """Yield what of *seen* its release would read wrongly, beginning with the rule's name."""
    for name, rule, first, last in RULES:
        if first <= seen.version and (last is None or seen.version < last):
            complaint = rule(seen)
            if complaint is not None:
                yield f"({name}): {complaint}"


REWRITES = (widen_bytes_first, axes_as_attributes)
IN_THE_GRAPH = {"bf16-backbone": "bf16"}  # a bundle's precision as the graph shows it, where names differ


def lint(
    model: onnx.ModelProto, version: Version, profiles: Sequence[Profile]
) -> tuple[onnx.ModelProto, tuple[Hazard, ...]]:
    """Return a copy of *model* that TensorRT *version* reads rightly, and what was rewritten for it.

    Raises `LoweringError` naming the first rule that the graph breaks.
    """
    safe = onnx.ModelProto.FromString(model.SerializeToString())
    refuse_a_fixed_batch(safe, profiles)
    name_operators(safe)
    refuse(next(complaints(look_at(safe, version)), None), version)
    done = [rewrite(safe, version) for rewrite in REWRITES]
    refuse(newer_opset(safe, version), version)
    return safe, tuple(hazard for hazard in done if hazard is not None)


def name_operators(model: onnx.ModelProto) -> None:
    """Give every operator of *model* a name of its own, by which layers of the engine are traced back."""
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{index}"
        taken.add(node.name)


def refuse(complaint: str | None, version: Version) -> None:
    """Raise *complaint* where there is one."""
    if complaint is not None:
        raise LoweringError(f"TensorRT {version[0]}.{version[1]} {complaint}")


def refuse_a_fixed_batch(model: onnx.ModelProto, profiles: Sequence[Profile]) -> None:
    """Refuse a graph whose batch is a number where *profiles* ask for others."""
    wanted = {size for profile in profiles for size in (profile.minimum, profile.maximum)}
    for value in model.graph.input:
        batch = value.type.tensor_type.shape.dim[0]
        if batch.HasField("dim_value") and wanted != {batch.dim_value}:
            raise LoweringError(
                f"the graph fixes the batch of {value.name} to {batch.dim_value}; profiles for "
                f"{', '.join(map(str, profiles))} need a free one: export the bundle again"
            )


def refuse_another_precision(model: onnx.ModelProto, asked: str, version: Version | None) -> None:
    """Refuse a build whose *asked* precision is not in the graph.

    TensorRT 11 has no switch for it and 10 ignores it in a typed network: the build would end with exit
    code 0 and an engine of the graph's own precision.
    """
    found = graph_precision(model)
    if found != IN_THE_GRAPH.get(asked, asked):
        release = f"TensorRT {version[0]} takes" if version is not None else "TensorRT takes"
        raise EngineError(
            f"{asked} was asked for and the graph is {found}; {release} the precision from the graph: "
            f"export the checkpoint again with `sopdeploy export --precision {asked}`"
        )
