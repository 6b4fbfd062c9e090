"""`sopdeploy verify`: is this bundle whole, and does this machine compute it right? Offline."""

from pathlib import Path

from sopdeploy.config import StrictModel
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings, load_settings


class ReplayRecord(StrictModel):
    """How far the outputs of the probes deviated at one batch size, and the bounds they kept."""

    batch: int
    images: int
    deviation: dict[str, float]
    tolerance: dict[str, float]


class Verification(StrictModel):
    """What was verified; that it exists means that everything held."""

    bundle: str
    id: str
    model: str
    files: int
    bytes: int
    runtime: str
    device: str
    replays: tuple[ReplayRecord, ...]


def verify(bundle_path: Path, settings: Settings | None = None) -> Verification:
    """Check every file of the bundle against its manifest, then replay its probes.

    Raises `BundleError` for the files, `ParityError` for the numbers, `RuntimeUnavailableError`
    where nothing here can run it.
    """
    inference = load_model(bundle_path, settings or load_settings(), thorough=True)
    bundle = inference.bundle
    return Verification(
        bundle=bundle.name,
        id=bundle.manifest.id,
        model=bundle.manifest.model,
        files=len(bundle.manifest.files),
        bytes=sum(record.bytes for record in bundle.manifest.files.values()),
        runtime=inference.runtime.name,
        device=inference.runtime.device,
        replays=tuple(
            ReplayRecord(
                batch=batch,
                images=found.images,
                deviation=found.deviation,
                tolerance=found.tolerance,
            )
            for batch, found in inference.replays.items()
        ),
    )
