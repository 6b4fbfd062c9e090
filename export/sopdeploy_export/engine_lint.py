"""The hazard lint: what this TensorRT would read wrongly is rewritten exactly, or the build is refused.

The dangerous hazards are those where nothing fails: the engine builds, runs and answers, from another
network. So the lint runs before every build, knows the release, and the probes run after it.
"""

from collections.abc import Sequence

import onnx

from sopdeploy.engines.binding import Version
from sopdeploy.engines.profiles import Profile
from sopdeploy.engines.record import Hazard
from sopdeploy.errors import EngineError, LoweringError
from sopdeploy_export.engine_graph import graph_precision
from sopdeploy_export.engine_hazards import complaints, look_at, newer_opset
from sopdeploy_export.engine_rewrites import axes_as_attributes, widen_bytes_first

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
