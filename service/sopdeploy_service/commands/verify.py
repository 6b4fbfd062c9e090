"""`sopdeploy verify`: check a bundle's files and its outputs on this machine."""

from pathlib import Path

from sopdeploy.config import StrictModel
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings, load_settings


class ReplayRecord(StrictModel):
    """The deviation and tolerance of each output at one batch size."""

    batch: int
    images: int
    deviation: dict[str, float]
    tolerance: dict[str, float]


class Verification(StrictModel):
    """The facts of a bundle that passed every check."""

    bundle: str
    id: str
    model: str
    onnx_root: str
    files: int
    bytes: int
    runtime: str
    device: str
    replays: tuple[ReplayRecord, ...]


def verify(bundle_path: Path, settings: Settings | None = None) -> Verification:
    """Check every file and the root of the graph, then replay every probe alone and in batches.

    Raises `BundleError` for the files and the root, `ParityError` for the numbers, and
    `RuntimeUnavailableError` if no runtime here can run the bundle.
    """
    loaded = load_model(bundle_path, settings or load_settings(), thorough=True)
    bundle = loaded.bundle
    return Verification(
        bundle=bundle.name,
        id=bundle.manifest.id,
        model=bundle.manifest.model,
        onnx_root=bundle.manifest.lineage.onnx_root,
        files=len(bundle.manifest.files),
        bytes=sum(record.bytes for record in bundle.manifest.files.values()),
        runtime=loaded.runtime.name,
        device=loaded.runtime.device,
        replays=tuple(
            ReplayRecord(
                batch=batch, images=found.images, deviation=found.deviation, tolerance=found.tolerance
            )
            for batch, found in loaded.replays.items()
        ),
    )
