"""Latency of a mixture in ONNX Runtime on one core: the K of 16 experts that an image needs, and all 16.

Both forms are exported, their outputs are compared, and they are timed alternately at batch size 1 and 8.
`met` is true if every speed-up reaches its target.

    python benchmarks/lowering.py [--quick] [--json]
"""

import sys
from time import process_time

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from measure import Result, compare, parse, report
from torch import Tensor, nn
from torch.export import Dim

from sopdeploy.layers.isqrt_cov import NewtonSchulzConfig
from sopdeploy.layers.mixture import Components, Convolutions, keep_largest
from sopdeploy_export.graph import convert

TOLERANCE = 2e-5  # relative to the largest value; both sides are float32
TARGETS = {8: 1 / 0.52, 2: 1 / 0.17}  # speed-up by K


class Routed(nn.Module):
    """16 experts and the selection of *chosen* of them, from feature maps and gate logits.

    Runs the chosen experts as an exported graph does, or with *all_experts* all of them.
    """

    def __init__(self, chosen: int, *, all_experts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.chosen, self.all_experts = chosen, all_experts
        self.experts = Components(
            "sop", 256, Convolutions((256, 128)), components=16, counted=chosen, root=NewtonSchulzConfig()
        )

    def forward(self, features_BCHW: Tensor, logits_BN: Tensor) -> Tensor:
        """Compute the weighted sum of the experts' vectors."""
        weights_BN = keep_largest(logits_BN, self.chosen)
        pooled: Tensor = self.experts(features_BCHW, weights_BN, gather=not self.all_experts)
        return pooled


def inputs_of(batch: int) -> tuple[Tensor, Tensor]:
    """Create non-negative 8x8 feature maps and gate logits."""
    generator = torch.Generator().manual_seed(batch)
    maps = torch.randn(batch, 256, 8, 8, generator=generator).relu()
    return maps, torch.randn(batch, 16, generator=generator)


def session_of(layer: nn.Module) -> ort.InferenceSession:
    """Convert *layer* to ONNX as an export does, and open it in ONNX Runtime on one thread."""
    batch = Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(layer.eval(), inputs_of(2), dynamic_shapes=({0: batch}, {0: batch}))
    model = ir.to_proto(convert(program, ["features", "logits"], ["vector"]))
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def compare_forms(chosen: int, runs: int) -> list[Result]:
    """Compare the outputs of both forms, then time them at both batch sizes."""
    sessions = [session_of(Routed(chosen, all_experts=every)) for every in (False, True)]
    results = []
    for batch in (1, 8):
        given = dict(zip(("features", "logits"), (x.numpy() for x in inputs_of(batch)), strict=True))
        sides = [lambda one=one, given=given: one.run(None, given)[0] for one in sessions]
        ours, other = sides[0](), sides[1]()
        case = f"mixture, K={chosen} of 16, batch {batch}"
        if np.abs(ours - other).max() > TOLERANCE * np.abs(other).max():
            sys.exit(f"{case}: the outputs of both sides differ")
        results.append(compare(case, "all 16", *sides, runs=runs, warmups=3, clock=process_time))
    return results


def main() -> None:
    """Time all cases; list those that miss their target."""
    arguments = parse(__doc__)
    torch.set_num_threads(1)
    results: list[Result] = []
    missed: list[str] = []
    for chosen, target in TARGETS.items():
        timed = compare_forms(chosen, 11 if arguments.quick else 41)
        missed += [one.case for one in timed if one.ratio is None or 1 / one.ratio < target]
        results += timed
    report(results, as_json=arguments.json, met=not missed, short=missed)


if __name__ == "__main__":
    main()
