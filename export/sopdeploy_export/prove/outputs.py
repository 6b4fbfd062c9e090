"""Statement 4: the networks return bitwise equal outputs for probe images, alone and in batches."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sopdeploy.errors import CertificateError
from sopdeploy_export.program_hashes import are_equal

STATEMENT = "These networks return bitwise equal outputs for probe images, alone and in batches."

_SINGLE_PROBES = 4  # compared one by one
MAX_BATCH = 16  # largest batch of probes


def prove_outputs(networks: Mapping[str, nn.Module], probes: Tensor) -> tuple[int, ...]:
    """Compare the outputs of *networks* for *probes* with those of the first one; return the batch sizes.

    Raises `CertificateError` unless they are bitwise equal.
    """
    single = [probes[i : i + 1] for i in range(min(_SINGLE_PROBES, len(probes)))]
    batches = [probes[i : i + MAX_BATCH] for i in range(0, len(probes), MAX_BATCH)]
    reference = next(iter(networks))
    for images in (*single, *batches):
        with torch.no_grad():
            outputs = {role: network(images) for role, network in networks.items()}
        for role in outputs:
            for values, expected in zip(outputs[role], outputs[reference], strict=True):
                if not are_equal(values, expected):
                    difference = (values - expected).abs().max().item()
                    raise CertificateError(
                        f"the {role} network gives other logits than the {reference} one at batch "
                        f"{len(images)}: largest difference {difference:.3g}"
                    )
    return (1, len(batches[0]))  # the last batch may be smaller
