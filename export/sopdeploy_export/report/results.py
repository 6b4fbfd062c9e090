"""The results of an export, and the speed of the exported file against the plain backbone.

Speed is measured only on request, because timings differ between runs, so two exports of one checkpoint would
differ. The plain backbone is converted without rewrites. Both graphs run in turn, in alternating order, so
that other load on the machine slows both; the result is the median of the runs after the warm-up.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import BatchRange, FileRecord, Manifest
from sopdeploy.config import StrictModel
from sopdeploy.environment import machine
from sopdeploy.evaluation.statistics import wilson
from sopdeploy.html.templates import render
from sopdeploy_export.parity.onnx_file import open_session
from sopdeploy_export.parity.report import ParityReport
from sopdeploy_export.precision.report import PrecisionReport
from sopdeploy_export.proof.certificate import Certificate
from sopdeploy_export.report.network_summary import NetworkSummary
from sopdeploy_export.rewrites.apply import LoweringReport
from sopdeploy_export.subject import ExportSubject

WARMUPS, MIN_RUNS, MAX_RUNS = 2, 5, 200
BUDGET_SECONDS = 1.0  # of timed runs per batch size
LARGEST_BATCH = 32


class SpeedRow(StrictModel):
    """Median times of the exported file and of the plain graph, over `runs` runs with `batch` images."""

    batch: int
    runs: int
    ours_ms: float
    plain_ms: float

    @property
    def ratio(self) -> float:
        """The exported file's time divided by the plain graph's."""
        return self.ours_ms / self.plain_ms


class Speed(StrictModel):
    """The timings on one machine, by batch size."""

    runtime: str
    machine: dict[str, str | int | float]
    rows: tuple[SpeedRow, ...]


def measure_speed(path: Path, plain: onnx.ModelProto, images: NDArray[np.uint8], batch: BatchRange) -> Speed:
    """Time the file at *path* and the *plain* graph on *images* (P, H, W, 3), for batches of 1, 2, 4, ..."""
    sessions = (open_session(path), open_session(plain))
    name = sessions[0].get_inputs()[0].name, sessions[1].get_inputs()[0].name
    rows = []
    for power in range(min(batch.maximum, LARGEST_BATCH).bit_length()):
        size = 2**power
        pixels = images[np.arange(size) % len(images)]
        seconds: tuple[list[float], list[float]] = ([], [])
        sides = [(session, {name[i]: pixels}, seconds[i]) for i, session in enumerate(sessions)]
        for _ in range(WARMUPS):
            for session, feed, _taken in sides:
                session.run(None, feed)
        while len(seconds[0]) < MAX_RUNS and (
            len(seconds[0]) < MIN_RUNS or sum(map(sum, seconds)) < BUDGET_SECONDS
        ):
            sides.reverse()  # the graph that runs first changes the caches for the second
            for session, feed, taken in sides:
                start = time.perf_counter()
                session.run(None, feed)
                taken.append(time.perf_counter() - start)
        ours, other = (statistics.median(taken) * 1e3 for taken in seconds)
        rows.append(SpeedRow(batch=size, runs=len(seconds[0]), ours_ms=ours, plain_ms=other))
    return Speed(runtime=f"onnxruntime {ort.__version__}", machine=machine(), rows=tuple(rows))


def describe_top1(share: float, images: int) -> str:
    """Format a top-1 accuracy on *images* with its 95 % interval (Wilson)."""
    low, high = wilson(round(share * images), images)
    return f"{100 * share:.2f} % (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportResults:
    """The results shown in `report.html`.

    `fields` are those of the manifest; `files` are the files of the bundle except the page and the manifest.
    """

    subject: ExportSubject
    network_summary: NetworkSummary
    certificate: Certificate
    lowering: LoweringReport
    parity: ParityReport
    precision: PrecisionReport
    speed: Speed | None
    fields: Mapping[str, Any]
    files: Mapping[str, FileRecord]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """The bundle that an export wrote, and its results."""

    path: Path
    manifest: Manifest
    certificate: Certificate
    parity: ParityReport
    precision: PrecisionReport
    lowering: LoweringReport
    network_summary: NetworkSummary
    speed: Speed | None
    warnings: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        """Render the main facts and a link to the report for a notebook."""
        certificate, parity, summary = self.certificate, self.parity, self.network_summary
        decision = self.manifest.decision
        facts = [
            ("removed", ", ".join(certificate.detached) or "nothing"),
            ("kept", f"{len(certificate.kept)} tensors, sha256 equal before and after"),
            ("graph", f"{' = '.join(certificate.compared)}, root {certificate.roots.any_batch[:16]}"),
            ("logits", f"bitwise equal on {certificate.images} probe images"),
            ("drift", f"{parity.logits.largest_drift:.2g}, allowed {parity.logits.tolerance:.2g}"),
            ("top class", f"equal on {parity.top1.agree} of {parity.top1.images} probe images"),
            ("parameters", f"{summary.shipped.parameters:,} of {summary.trained.parameters:,}"),
            ("precision", self.precision.precision),
            *([] if decision is None else decision.rows()),
            ("bundle", str(self.path)),
        ]
        return render("sopdeploy_export.report", "notebook_export.html", path=self.path, facts=facts)

    def summary(self) -> dict[str, Any]:
        """Build the output of `sopdeploy export --json`; `decision` only if one was fitted."""
        decision = self.manifest.decision
        return {
            "bundle": str(self.path),
            "id": self.manifest.id,
            "model": self.manifest.model,
            "proof": self.certificate.proof,
            "detached": list(self.certificate.detached),
            "tensors_removed": len(self.certificate.removed),
            "bytes_removed": self.certificate.bytes_removed,
            "tensors_kept": len(self.certificate.kept),
            "roots": self.certificate.roots.model_dump(),
            "parity": self.parity.model_dump(),
            "precision": self.precision.model_dump(),
            "lowering": self.lowering.model_dump(),
            **({} if decision is None else {"decision": decision.model_dump(mode="json")}),
            "trained": self.network_summary.trained.model_dump(),
            "shipped": self.network_summary.shipped.model_dump(),
            "speed": None if self.speed is None else self.speed.model_dump(),
            "warnings": list(self.warnings),
        }
