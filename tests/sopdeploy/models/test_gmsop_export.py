"""That the shipped network has an ONNX form: no control flow, any batch, the same numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sopdeploy.models.gmsop import GatedResNet
from sopdeploy.models.registry import create_model

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own
CONTROL_FLOW = {"Loop", "If", "Scan", "NonZero", "Compress"}
SWITCHES: dict[str, Any] = {
    "blocks_per_stage": 1,
    "components": 5,
    "chosen": 2,
    "component_widths": (12, 8),
    "gate_widths": (8, 6),
    "iterations": 3,
    "num_classes": 7,
}


class WithGates(nn.Module):
    """The network as an exporter sees it: logits and gate weights."""

    def __init__(self, network: GatedResNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.outputs_tuple(images)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("component", "tied"), [("sop", False), ("sop", True), ("gap", False), ("linear", False)]
)
def test_the_graph_agrees_for_any_batch_and_has_no_control_flow(
    component: str, tied: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    shipped = create_model("gmsop-16-8-resnet18", component=component, **SWITCHES).inference_model().eval()
    assert isinstance(shipped, GatedResNet)
    if not tied:
        nn.init.normal_(shipped.gate.weight)
    network, path = WithGates(shipped).eval(), tmp_path / "model.onnx"
    torch.onnx.export(
        network,
        (torch.randn(2, 3, 16, 16),),
        path,
        dynamo=True,
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=64)}},
        input_names=["images"],
        output_names=["logits", "gates"],
        verbose=False,
    )
    graph = onnx.load(path)
    assert not {node.op_type for node in graph.graph.node} & CONTROL_FLOW
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            expected = network(images)
        found = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found[0], expected[0].numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found[1], expected[1].numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found[1] > 0, expected[1].numpy() > 0)
