"""`sopdeploy verify`: check a bundle's files and its outputs on this machine."""

from pathlib import Path

from sopdeploy.bundle.golden import PixelDifference, check_golden, read_golden
from sopdeploy.config import StrictModel
from sopdeploy_service.images.decode import EncodedImage, decode
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import PILLOW_PIXELS, Settings, load_settings


class ReplayRecord(StrictModel):
    """The deviation and tolerance of each output at one batch size."""

    batch: int
    images: int
    deviation: dict[str, float]
    tolerance: dict[str, float]


class Verification(StrictModel):
    """The facts of a bundle that passed every check; `golden` counts its golden examples.

    `onnx_root` is the root that was recomputed from `model.onnx`; None if `onnx` is not installed. `pixels`
    is the largest difference of the pixels of golden examples; None if they are those of the export.
    """

    bundle: str
    id: str
    model: str
    onnx_root: str | None
    files: int
    bytes: int
    runtime: str
    device: str
    replays: tuple[ReplayRecord, ...]
    golden: int
    pixels: PixelDifference | None = None


def verify(bundle_path: Path, settings: Settings | None = None) -> Verification:
    """Check every file and, if `onnx` is installed, the root of the graph; replay probes and golden examples.

    Raises `BundleError` if a file or the root is wrong, `ParityError` if an output deviates, and
    `RuntimeUnavailableError` if no runtime of this machine can run the bundle.
    """
    loaded = load_model(bundle_path, settings or load_settings(), thorough=True)
    bundle, examples = loaded.bundle, read_golden(loaded.bundle)
    output = bundle.manifest.outputs[0].name
    differences = []
    for example in examples:
        image = EncodedImage(example.jpeg)
        rules, size = bundle.manifest.preprocess, len(example.jpeg)
        decoded = decode(image, rules, max_bytes=size, max_pixels=PILLOW_PIXELS)
        differences.append(
            check_golden(
                example,
                decoded.pixels,
                lambda image: loaded.runtime.run(image[None])[output][0],
                bundle.manifest.versions.get("pillow"),
            )
        )
    return Verification(
        bundle=bundle.name,
        id=bundle.manifest.id,
        model=bundle.manifest.model,
        onnx_root=loaded.onnx_root,
        files=len(bundle.manifest.files),
        bytes=sum(record.bytes for record in bundle.manifest.files.values()),
        runtime=loaded.runtime.name,
        device=loaded.runtime.device,
        replays=tuple(
            ReplayRecord(
                batch=batch, images=replay.images, deviation=replay.deviation, tolerance=replay.tolerance
            )
            for batch, replay in loaded.replays.items()
        ),
        golden=len(examples),
        pixels=max(filter(None, differences), key=lambda difference: difference.drift, default=None),
    )
