"""Bundles of small graphs, bundles without a network, and forged bundles: right hashes, wrong content."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from sopdeploy.base.files import sha256
from sopdeploy.bundle.folder import MANIFEST, REQUIRED
from sopdeploy.bundle.golden import write_golden
from sopdeploy.bundle.manifest import (
    CERTIFICATE,
    PROOFS,
    BatchRange,
    Lineage,
    Manifest,
    ProofKind,
    TensorRecord,
    to_json,
)
from sopdeploy.bundle.onnx_root import read_model
from sopdeploy.bundle.probes import Probes, write_probes
from sopdeploy.bundle.publication import publish, seal, staging
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.version import __version__

LABELS = ["ant", "bee", "cat"]
FIELDS: dict[str, Any] = {
    "project": "tiny",
    "exported_at": "2026-01-02T03:04:05.000000Z",
    "model": "tiny",
    "config": {"width": 4},
    "inputs": (TensorRecord(name="images", dtype="uint8", shape=(None, 16, 16, 3)),),
    "outputs": (TensorRecord(name="logits", dtype="float32", shape=(None, len(LABELS))),),
    "preprocess": Preprocess(resize=18, crop=16),
    "batch": BatchRange(),
    "opset": 18,
    "detached": ("branches",),
    "lineage": Lineage(checkpoint_sha256="0" * 64, program_root="1" * 64, onnx_root="2" * 64),
    "versions": {"sopdeploy": __version__},
}


def proof_files(root: str, tolerance: float = 0.0, **fields: Any) -> dict[str, bytes]:
    """The reports on a graph with *root* and manifest *fields*; they explain *tolerance* of the logits."""
    detached = fields.get("detached", FIELDS["detached"])
    precision = fields.get("precision", "fp32")
    proof: ProofKind = "three-way" if detached else "trained-plain"
    roots = {"any_batch": FIELDS["lineage"].program_root, "onnx": root, "shipped": root}
    drift = {"noise_floor": tolerance / 16, "drift": {"1": 0.0}, "batch_difference": 0.0}
    parity = {
        "precision": precision,
        "floors_allowed": 16,
        "drift_allowed": False,
        "outputs": {"logits": drift},
    }
    certificate = {
        "proof": proof,
        "compared": PROOFS[proof],
        "detached": detached,
        "removed": [{"name": f"{part}.weight"} for part in detached],
        "roots": roots,
        "precision": precision,
        "mixes_images": [],
        "statements": {"Removed": "proved", "Graph": "proved", "File": "measured"},
    }
    types = {"precision": precision, "parts": {}}
    reports = {"certificate": certificate, "parity": parity, "precision": types}
    return {f"{name}.json": to_json(report) for name, report in reports.items()}


def bind(folder: Path, manifest: Manifest) -> Manifest:
    """Write the certificate in *folder* again, for the files and *manifest* there; return the manifest."""
    with suppress(ValueError):  # a certificate that is not a JSON object stays
        certificate = json.loads((folder / CERTIFICATE).read_bytes())
        (folder / CERTIFICATE).unlink()
        (folder / MANIFEST).unlink(missing_ok=True)
        own = {
            name: value
            for name, value in certificate.items()
            if name not in ("sha256", "contents")
        }
        fields = {
            name: getattr(manifest, name) for name in Manifest.model_fields if name != "files"
        }
        return seal(folder, fields, own)
    return manifest


def fill(folder: Path) -> None:
    """Write all files of a bundle except its manifest into *folder*."""
    for name in REQUIRED:
        (folder / name).write_bytes(name.encode() * 20)
    (folder / "labels.json").write_bytes(to_json(LABELS))
    (folder / "README.md").write_text("# tiny\n")


def graph(text: str, **weights: NDArray[Any]) -> onnx.ModelProto:
    """Parse the ONNX *text* of a graph whose initializers are *weights*."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 18]> {text}')
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    return model


def write_hollow(
    destination: Path, change: Callable[[Path], None] = lambda _: None, **fields: Any
) -> Path:
    """Write a bundle whose graph is text; *change* may change its files before it is sealed."""
    with staging(destination) as folder:
        fill(folder)
        change(folder)
        return publish(folder, seal(folder, {**FIELDS, **fields}), destination)


def write_computed(
    destination: Path,
    model: onnx.ModelProto,
    images: NDArray[np.uint8],
    tolerance: float,
    *,
    preprocess: Preprocess,
    labels: Sequence[str] = LABELS,
    wrong_by: float = 0.0,
    renamed: dict[str, str] | None = None,
    **fields: Any,
) -> Path:
    """Write a bundle of *model* whose probes, on *images*, and golden examples are computed.

    They are *wrong_by* so much. Outputs in *renamed* have another name in the probes.
    """
    content = model.SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_outputs()]

    def compute(batch: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        values = session.run(None, {"images": batch})
        return {
            name: value + np.float32(wrong_by)
            for name, value in zip(names, values, strict=True)
        }

    expected = {
        (renamed or {}).get(name, name): value for name, value in compute(images).items()
    }
    _, root = read_model(content)
    with staging(destination) as folder:
        (folder / "model.onnx").write_bytes(content)
        (folder / "labels.json").write_bytes(to_json(list(labels)))
        for name, proof in proof_files(root, tolerance, **fields).items():
            (folder / name).write_bytes(proof)
        tolerances = dict.fromkeys(expected, tolerance)
        write_probes(
            folder / "probes.npz",
            Probes(images=images, expected=expected, tolerance=tolerances),
        )
        write_golden(
            folder, preprocess, lambda pixels: compute(pixels[None])["logits"][0], 2 * tolerance
        )
        outputs = tuple(
            TensorRecord(name=tensor.name, dtype="float32", shape=(None, *tensor.shape[1:]))
            for tensor in session.get_outputs()
        )
        side = preprocess.crop
        computed = {
            "inputs": (
                TensorRecord(name="images", dtype="uint8", shape=(None, side, side, 3)),
            ),
            "outputs": outputs,
            "preprocess": preprocess,
            "lineage": FIELDS["lineage"].model_copy(update={"onnx_root": root}),
        }
        return publish(
            folder, bind(folder, seal(folder, {**FIELDS, **computed, **fields})), destination
        )


def forge(bundle: Path, *, bound: bool = True, **fields: Any) -> Path:
    """Rewrite the manifest of *bundle* with the hashes of its current files and with *fields*.

    If *bound*, the certificate is rewritten as well, with hashes of both.
    """
    values = json.loads((bundle / MANIFEST).read_bytes())
    values.pop("id")
    values.pop("sha256")
    values["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(bundle.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    values.update(fields)
    manifest = Manifest.model_validate_json(json.dumps(values))
    (bundle / MANIFEST).write_bytes(manifest.to_bytes())
    if bound:
        bind(bundle, manifest)
    return bundle


def flip(file: Path, place: int) -> None:
    """Flip one bit of the byte at *place*."""
    body = bytearray(file.read_bytes())
    body[place] ^= 1
    file.write_bytes(body)
