"""Outputs: the networks return bitwise equal outputs for probe images, alone and in batches.

This says nothing of other images, of which only the graphs do.

Refused: other numbers outside of the graph (`tests/attacks/planted/graphs.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sopdeploy.errors import CertificateError
from sopdeploy_export.program_hashes import are_equal

STATEMENT = (
    "These networks return bitwise equal outputs for probe images, alone and in batches."
)
SINGLE_PROBES = 4  # that run alone, too
MAX_BATCH = 16  # largest batch of probes
Run = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class ProbeOutputs:
    """The outputs of a run for probes: of the first ones alone, and of all in batches of `MAX_BATCH`.

    Each has one tensor of shape (P, ...) for every output of the network.
    """

    single: tuple[Tensor, ...]
    batched: tuple[Tensor, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, run: Run, probes: Tensor) -> "ProbeOutputs":
        """Run uint8 *probes* (P, H, W, 3)."""
        single = [run(probes[i : i + 1]) for i in range(min(SINGLE_PROBES, len(probes)))]
        batched = [run(probes[i : i + MAX_BATCH]) for i in range(0, len(probes), MAX_BATCH)]
        return cls(
            *(tuple(map(torch.cat, zip(*runs, strict=True))) for runs in (single, batched))
        )

    @property
    def sizes(self) -> tuple[int, int]:
        """The sizes of the batches; the last one may be smaller."""
        return 1, min(len(self.batched[0]), MAX_BATCH)


def prove_outputs(
    networks: Mapping[str, Run],
    probes: Tensor,
    on_network: Callable[[str], None] = lambda _: None,
) -> ProbeOutputs:
    """Return the outputs of *networks* for uint8 *probes* (P, H, W, 3).

    Calls *on_network* as each network begins. Raises `CertificateError` unless all have those
    of the first network, bit for bit.
    """
    outputs = {}
    for role, network in networks.items():
        on_network(f"{role} network")
        outputs[role] = ProbeOutputs.of(network, probes)
    reference, first = next(iter(outputs.items()))
    for role, found in outputs.items():
        runs = ((found.single, first.single), (found.batched, first.batched))
        for size, (values_by_output, expected_by_output) in zip(found.sizes, runs, strict=True):
            for values, expected in zip(values_by_output, expected_by_output, strict=True):
                if not are_equal(values, expected):
                    difference = (values - expected).abs().max().item()
                    raise CertificateError(
                        f"the {role} network gives other logits than the {reference} one at batch {size}: "
                        f"largest difference {difference:.3g}"
                    )
    return first
