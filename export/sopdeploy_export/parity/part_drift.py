"""Measure the drift of the exported file module by module.

The exported graph keeps the value names of the converter. Converting the network again gives the same names
and, for each value, its module. So the outputs of modules can be read from the file and computed from the
captured graph, in float64 and in the exported precision.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import fx
from torch.export import ExportedProgram

from sopdeploy_export.graph import PREFIX, InFloat64, with_converter_names
from sopdeploy_export.parity.onnx_file import Arrays, fixed_batch, run_file
from sopdeploy_export.parity.report import PartDrift

MAX_PARTS, IMAGES = 40, 2  # limits time and memory of every export


class ModuleOutput(NamedTuple):
    """The output of a module: its name in the file, and its node in the captured graph."""

    module: str
    value: str
    node: str


def part_drifts(
    path: Path, program: ExportedProgram, outputs: Sequence[str], images: NDArray[np.uint8]
) -> tuple[PartDrift, ...]:
    """Measure the drift of the file at *path* at the outputs of at most `MAX_PARTS` modules, in graph order.

    *program* is the captured network with its *outputs*; the last of *images* (P, H, W, 3) are used. Drifts
    that are not finite are left out.
    """
    model = onnx.load(path)
    images = images[-IMAGES:][: fixed_batch(model)]
    converted = with_converter_names(program, outputs, max(opset.version for opset in model.opset_import))
    if converted is None:
        return ()
    modules = evenly_spaced(module_outputs(converted, model))
    found = run_file(model, [each.value for each in modules], images)
    graph, nodes = converted.module(), {each.node for each in modules}
    exact = record(copy.deepcopy(graph).double(), nodes, images, exact=True)
    own = record(graph, nodes, images, exact=False)
    drifts = [
        measure_drift(each.module, found[each.value], exact[each.node], own[each.node])
        for each in modules
        if each.node in exact and found[each.value].shape == exact[each.node].shape
    ]
    return tuple(drift for drift in drifts if np.isfinite(drift.drift))


def module_outputs(program: ExportedProgram, model: onnx.ModelProto) -> list[ModuleOutput]:
    """Find the values of *model* that are outputs of top-level modules and of their children."""
    in_file = {name for node in model.graph.node for name in node.output}
    results = next(node for node in program.graph.nodes if node.op == "output").args[0]
    names = dict(zip(results, (value.name for value in model.graph.output), strict=True))
    last_nodes: dict[str, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and names.get(node, node.name) in in_file:
            for path, _ in (node.meta.get("nn_module_stack") or {}).values():
                last_nodes[path.removeprefix(PREFIX)] = node
    module_of = {
        node: module
        for module, node in last_nodes.items()  # a child that ends with its parent comes after it
        if module not in {"", "network"} and module.count(".") <= 1
    }
    return [
        ModuleOutput(module_of[node], names.get(node, node.name), node.name)
        for node in program.graph.nodes
        if node in module_of
    ]


def evenly_spaced(modules: list[ModuleOutput]) -> list[ModuleOutput]:
    """Select at most `MAX_PARTS` of *modules*, among them the first and the last."""
    if len(modules) <= MAX_PARTS:
        return modules
    return [modules[position] for position in np.linspace(0, len(modules) - 1, MAX_PARTS).round().astype(int)]


def record(graph: fx.GraphModule, nodes: set[str], images: NDArray[np.uint8], *, exact: bool) -> Arrays:
    """Run *graph* on *images* and return the tensors of *nodes* by name; *graph* is in float64 if *exact*."""
    recorder = _Recorder(graph, nodes, exact=exact)
    with torch.no_grad():
        recorder.run(torch.from_numpy(images))
    return recorder.values


class _Recorder(fx.Interpreter):
    """Run a captured graph, in float64 if *exact*, and keep the values of *nodes*."""

    def __init__(self, graph: fx.GraphModule, nodes: set[str], *, exact: bool) -> None:
        super().__init__(graph)
        self.nodes, self.exact = nodes, exact
        self.values: Arrays = {}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation; in float64, without its assertion about dtypes."""
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        with InFloat64() if self.exact else nullcontext():
            return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep its value if it is wanted."""
        value = super().run_node(n)
        if n.name in self.nodes and isinstance(value, torch.Tensor):
            self.values[n.name] = value.double().numpy()
        return value


def measure_drift(module: str, found: NDArray[Any], exact: NDArray[Any], own: NDArray[Any]) -> PartDrift:
    """Compute the drift of *found* from *exact*; the noise floor is the drift of *own* from *exact*.

    *found* is read from the file, *exact* is in float64, *own* is the network in the exported precision.
    """
    largest = float(np.abs(exact).max(initial=0.0))
    own_drift = float(np.abs(own - exact).max(initial=0.0))
    return PartDrift(
        part=module,
        drift=float(np.abs(found.astype(np.float64) - exact).max(initial=0.0)),
        noise_floor=max(4 * float(np.finfo(np.float32).eps) * largest, own_drift, 1e-30),
    )
