"""`sopdeploy verify`: check a bundle's files and its outputs on this machine."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.golden import PixelDifference, check_golden, read_golden
from sopdeploy.bundle.probes import Replay, read_probes
from sopdeploy.config import StrictModel
from sopdeploy.errors import BundleError
from sopdeploy_service.images.decode import EncodedImage, decode
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.runtime.base import must_run
from sopdeploy_service.settings import PILLOW_PIXELS, Settings, load_settings

FEW_PROBES = 8  # fewer are noted; an export generates 12 and leaves out those whose route is undecided
WIDE = 0.1
ALLOWED_DRIFTS = 2  # tolerance in drifts, if `export --allow-drift` allowed them
_ROUNDING = 1 + 1e-9


class Verification(StrictModel):
    """The facts of a bundle that passed every check; `golden` counts its golden examples.

    `replays` has the deviation and the tolerance of each output by batch size.

    `onnx_root` is the root that was recomputed from `model.onnx`; None if `onnx` is not installed. `pixels`
    is the largest difference of the pixels of golden examples; None if they are those of the export. `notes`
    say what the checks of this bundle cannot show.
    """

    bundle: str
    id: str
    model: str
    onnx_root: str | None
    num_files: int
    bytes: int
    runtime: str
    device: str
    replays: tuple[Replay, ...]
    golden: int
    pixels: PixelDifference | None = None
    notes: tuple[str, ...] = ()


def verify(bundle_path: Path, settings: Settings | None = None) -> Verification:
    """Check every file and, if `onnx` is installed, the root of the graph; replay probes and golden examples.

    Raises `BundleError` if a file or the root is wrong, `ParityError` if an output deviates, and
    `RuntimeUnavailableError` if no runtime of this machine can run the bundle.
    """
    loaded = load_model(bundle_path, settings or load_settings(), thorough=True)
    bundle, examples = loaded.bundle, read_golden(loaded.bundle)
    output = bundle.manifest.outputs[0].name
    differences = []

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = loaded.runtime.run(pixels[None])[output][0]
        return logits

    for example in examples:
        image = EncodedImage(example.jpeg)
        rules, size = bundle.manifest.preprocess, len(example.jpeg)
        decoded = decode(image, rules, max_bytes=size, max_pixels=PILLOW_PIXELS)
        with must_run(loaded.runtime):
            exporter = bundle.manifest.versions.get("pillow")
            difference = check_golden(example, decoded.pixels, run, exporter)
        differences.append(difference)
    return Verification(
        bundle=bundle.name,
        id=bundle.manifest.id,
        model=bundle.manifest.model,
        onnx_root=loaded.onnx_root,
        num_files=len(bundle.manifest.files),
        bytes=sum(record.bytes for record in bundle.manifest.files.values()),
        runtime=loaded.runtime.name,
        device=loaded.runtime.device,
        replays=tuple(loaded.replays.values()),
        golden=len(examples),
        pixels=max(filter(None, differences), key=lambda difference: difference.drift, default=None),
        notes=_notes(bundle),
    )


def _notes(bundle: Bundle) -> tuple[str, ...]:
    """List what the probes of *bundle* leave open, and whether images of a batch may depend on each other.

    Raises `BundleError` if `parity.json` does not explain the tolerances of the probes.
    """
    probes, notes, advice = read_probes(bundle.probes), [], "export the bundle again"
    if len(probes.images) < FEW_PROBES:
        notes.append(f"only {len(probes.images)} probes; an export writes more")
    try:
        parity = json.loads((bundle.path / "parity.json").read_bytes())
        outputs, drifts = parity["outputs"], ALLOWED_DRIFTS if parity["drift_allowed"] else 0
        for name, tolerance in probes.tolerance.items():
            explained = float(parity["floors_allowed"]) * float(outputs[name]["noise_floor"])
            largest = max(*outputs[name]["drift"].values(), outputs[name]["batch_difference"])
            if not tolerance <= _ROUNDING * max(explained, drifts * largest):
                raise BundleError(
                    f"{bundle.probes}: parity.json does not explain the tolerance {tolerance:.2g} of {name}; "
                    f"{advice}"
                )
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BundleError(f"{bundle.path / 'parity.json'}: records no noise floor; {advice}") from error
    for name, tolerance in probes.tolerance.items():
        spread = float(np.ptp(probes.expected[name]))
        if tolerance > WIDE * spread:
            notes.append(
                f"{name}: the tolerance {tolerance:.2g} is above {WIDE:.0%} of the probes' range {spread:.2g}"
            )
    if bundle.manifest.mixes_images:
        notes.append(
            f"outputs may depend on other images of a batch: {', '.join(bundle.manifest.mixes_images)}"
        )
    return tuple(notes)
