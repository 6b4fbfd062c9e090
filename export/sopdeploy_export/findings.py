"""What an export found out about one bundle, and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.manifest import FileRecord, Manifest
from sopdeploy_export.anatomy import Anatomy
from sopdeploy_export.certificate import Certificate
from sopdeploy_export.lowering.report import LoweringReport
from sopdeploy_export.parity import ParityReport
from sopdeploy_export.precision_report import PrecisionReport
from sopdeploy_export.speed import Speed


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What was proved and measured; `fields` are the manifest's, `files` what lies in the bundle so far."""

    checkpoint: Checkpoint
    anatomy: Anatomy
    certificate: Certificate
    lowering: LoweringReport
    parity: ParityReport
    precision: PrecisionReport
    speed: Speed | None
    fields: Mapping[str, Any]
    files: Mapping[str, FileRecord]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """The bundle that was written, and what was proved and measured on the way."""

    path: Path
    manifest: Manifest
    certificate: Certificate
    parity: ParityReport
    precision: PrecisionReport
    lowering: LoweringReport
    anatomy: Anatomy
    speed: Speed | None

    def summary(self) -> dict[str, Any]:
        """Return what `sopdeploy export --json` prints."""
        return {
            "bundle": str(self.path),
            "id": self.manifest.id,
            "model": self.manifest.model,
            "detached": list(self.certificate.detached),
            "tensors_removed": len(self.certificate.removed),
            "bytes_removed": self.certificate.bytes_removed,
            "tensors_kept": len(self.certificate.kept),
            "roots": self.certificate.roots.model_dump(),
            "parity": self.parity.model_dump(),
            "precision": self.precision.model_dump(),
            "lowering": self.lowering.model_dump(),
            "trained": self.anatomy.trained.model_dump(),
            "shipped": self.anatomy.shipped.model_dump(),
            "speed": None if self.speed is None else self.speed.model_dump(),
        }
