"""The in-toto statement of a bundle, `statement.json`: what was proved and measured about `model.onnx`.

Format: in-toto Attestation Framework, Statement v1. A signature of the bundle covers the statement.
"""

from pathlib import Path
from typing import Any

from sopdeploy.bundle.manifest import Lineage
from sopdeploy.files import sha256
from sopdeploy_export.report.results import Results

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:sopdeploy:export:v1"


def export_statement(model: Path, lineage: Lineage, results: Results) -> dict[str, Any]:
    """Build the statement about the file *model* from the *lineage* and the *results* of its export."""
    certificate, parity = results.certificate, results.parity
    return {
        "_type": STATEMENT,
        "subject": [{"name": model.name, "digest": {"sha256": sha256(model)}}],
        "predicateType": PREDICATE,
        "predicate": {
            "checkpoint": {"digest": {"sha256": lineage.checkpoint_sha256}},
            "certificate": {
                "proof": certificate.proof,
                "detached": list(certificate.detached),
                "roots": certificate.roots.model_dump(mode="json"),
            },
            "onnxRoot": lineage.onnx_root,
            "parity": {
                "passed": parity.passed,
                "driftAllowed": parity.drift_allowed,
                "precision": parity.precision,
                "largestDrift": parity.logits.largest_drift,
                "tolerance": parity.logits.tolerance,
                "top1": parity.top1.model_dump(mode="json"),
                "images": parity.images,
            },
        },
    }
