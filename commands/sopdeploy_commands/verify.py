"""`sopdeploy verify`: check a bundle's files and its outputs on this machine."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sopdeploy.base.config import StrictModel, parse_json
from sopdeploy.bundle.folder import PROBES, Bundle
from sopdeploy.bundle.golden import check_golden, read_golden
from sopdeploy.bundle.manifest import OptionalPixels, describe_temperature
from sopdeploy.bundle.onnx_root import check_graph_and_certificate
from sopdeploy.bundle.probes import Probes, Replay, read_probes
from sopdeploy.bundle.second_order import NOTHING, count_second_order
from sopdeploy.bundle.statements import Statements, read_statements
from sopdeploy.cli.command import command
from sopdeploy.cli.console import print_check, print_field
from sopdeploy.errors import BundleError, amount
from sopdeploy.images.decode import decode
from sopdeploy_service.inference.loader import check_trust, load_bundle, open_in_time
from sopdeploy_service.runtime.base import translating_errors
from sopdeploy_service.settings import PILLOW_PIXELS, Settings, load_settings

# Fewer are noted; an export generates so many, and leaves out those whose route is undecided
FEW_PROBES = 4
WIDE = 0.1  # of the range of an output over the probes; a note says if a tolerance is above it
ALLOWED_DRIFTS = (
    2  # tolerance in drifts, if `export --set allow_numerical_error=true` allowed them
)
_ROUNDING = 1 + 1e-9


class Verification(StrictModel):
    """The facts of a bundle that passed every check; `notes` say what the checks cannot show.

    `replays` has the deviation and the tolerance of each output by batch size, `golden` the
    number of examples, whose pixels differ here from those of the export by at most `golden_levels`
    of 255, which changes the class of `golden_changed`. `onnx_root` was recomputed from
    `model.onnx`, and `second_order` says what its graph computes of second order; None and "" if
    `onnx` is not installed. `logits` says whether they are divided by the temperature; "" without
    one. `pixels` compares the pixels with those of the training, as the export measured; None if
    it did not. `statements` says which statements of the certificate the export proved, and which
    it measured.
    """

    bundle: str
    id: str
    model: str
    onnx_root: str | None
    second_order: str = ""
    logits: str = ""
    pixels: OptionalPixels = None
    statements: Statements
    num_files: int
    bytes: int
    runtime: str
    device: str
    replays: tuple[Replay, ...]
    golden: int
    golden_levels: int = 0
    golden_changed: int = 0
    notes: tuple[str, ...] = ()


def _show(result: Verification) -> None:
    """Print a line for each thing that was checked here, then the notes."""
    print_check(
        "files", f"{result.num_files} files, {result.bytes:,} bytes, have the recorded sha256"
    )

    # What the graph computes of second order, if anything, was counted again.
    if result.onnx_root is None:
        reason = "not computed again, because onnx is not installed: pip install onnx"
        print_check("graph", f"hash {reason}", None)
    else:
        computes = f": {result.second_order}" if result.second_order else ""
        print_check("graph", f"model.onnx has the graph that was exported{computes}")

    # The largest deviation of each output over all batch sizes.
    batches = " and ".join(str(replay.batch) for replay in result.replays)
    first = result.replays[0]
    deviations = [
        f"{name} differ by at most {max(replay.deviation[name] for replay in result.replays):.2g} "
        f"(allowed {tolerance:.2g})"
        for name, tolerance in first.tolerance.items()
    ]
    print_check(
        "outputs",
        f"{', '.join(deviations)} for {first.num_images} reference images, in batches of {batches}, "
        f"on {result.runtime}",
    )
    if result.golden:
        print_check("images", _describe_golden(result))

    # What only the export could measure, because the transform of the training is not in the bundle.
    if result.pixels is not None:
        is_same = not result.pixels.differences
        print_check("pixels", f"{result.pixels.describe()}, by the export", is_same)

    for note in result.notes:
        print_field("note", note, style="bold yellow")
    print_field("verified", f"{result.bundle}, id {result.id}", style="bold green")


@command(_show, examples=("sopdeploy verify bundles/photos-3f6c01d2a4b7",), keys=("runtime",))
def verify(
    bundle: str | Path, settings: Settings | None = None, *, runtime: str | None = None
) -> Verification:
    """Check every file of a bundle, its reference outputs and its golden examples on this machine, offline.

    If `onnx` is installed, the graph hash is computed again.

    Args:
        bundle: A bundle written by `sopdeploy export`.
        settings: Settings of the service; by default from the environment.
        runtime: Runtime, as for `serve`; by default the setting.

    Raises:
        BundleError: A file or the graph hash is wrong.
        ParityError: An output deviates.
        RuntimeUnavailableError: No runtime of this machine can run the bundle.
    """
    # The hashes of all files, the signature if one is required, the graph and the certificate.
    chosen = settings or load_settings(runtime=runtime)
    opened = open_in_time(Path(bundle), chosen)
    check_trust(opened, chosen)
    onnx_root = check_graph_and_certificate(opened)

    # The reference outputs. The signature is read once: it could be exchanged now.
    trusting = chosen.model_copy(update={"require_signature": None})
    loaded = load_bundle(opened, trusting, thorough=True)
    probes = read_probes(opened)
    _check_tolerances(opened, probes)

    manifest = opened.manifest
    examples = read_golden(opened)
    output = manifest.outputs[0].name

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return loaded.runtime.run(pixels[None])[output][0]

    # Each JPEG example must give the exporter's pixels, and with them its logits. An engine whose
    # larger error was allowed has this error here, too.
    tolerance = loaded.replays[1].tolerance[output]
    levels = num_changed = 0
    for example in examples:
        example = replace(example, tolerance=max(example.tolerance, tolerance))
        jpeg = example.jpeg
        decoded = decode(
            jpeg, manifest.preprocess, max_bytes=len(jpeg), max_pixels=PILLOW_PIXELS
        )
        with translating_errors(loaded.runtime):
            differs, is_changed = check_golden(
                example,
                decoded.pixels,
                run,
                manifest.versions.get("pillow"),
                manifest.preprocess,
            )
            levels = max(levels, differs)
            num_changed += is_changed

    return Verification(
        bundle=opened.name,
        id=manifest.id,
        model=manifest.model,
        onnx_root=onnx_root,
        second_order="" if onnx_root is None else _describe_second_order(opened),
        logits=describe_temperature(manifest.decision, manifest.temperature_scaling),
        pixels=manifest.pixels,
        statements=read_statements(opened),
        num_files=len(manifest.files),
        bytes=sum(record.bytes for record in manifest.files.values()),
        runtime=loaded.runtime.name,
        device=loaded.runtime.device,
        replays=tuple(loaded.replays.values()),
        golden=len(examples),
        golden_levels=levels,
        golden_changed=num_changed,
        notes=_list_notes(opened, probes),
    )


def _describe_golden(result: Verification) -> str:
    """Say whether the JPEG files of the bundle have the pixels of the export here, and how far they are from them."""
    files = f"{amount(result.golden, 'JPEG file')} of the bundle"
    if not result.golden_levels:
        return f"{files} decoded to the same pixels, with the same logits"

    changed = (
        f"another class in {result.golden_changed}"
        if result.golden_changed
        else "the same classes"
    )
    return (
        f"{files} decoded to pixels that differ by at most {result.golden_levels} of 255, with {changed}, "
        "because this machine resizes in another way"
    )


def _describe_second_order(bundle: Bundle) -> str:
    """Say what the graph computes of second order, also if a detached network computes nothing of it.

    Empty for other first-order networks.
    """
    import onnx

    # It was read without errors before, and its hash was compared.
    model = onnx.ModelProto.FromString(bundle.onnx.read())
    described = count_second_order(model).describe()
    return described or (NOTHING if bundle.manifest.detached else "")


def _check_tolerances(bundle: Bundle, probes: Probes) -> None:
    """Raise `BundleError` unless rounding errors, or allowed errors, explain the tolerances of *probes*."""
    advice = "export the bundle again"
    try:
        parity = parse_json(bundle.contents["parity.json"])
        outputs = parity["outputs"]
        allowed_drifts = ALLOWED_DRIFTS if parity["drift_allowed"] else 0

        # The largest tolerance that an export writes: a multiple of the rounding error or, if
        # a larger error was allowed, of this error.
        for name, tolerance in probes.tolerance.items():
            noise = float(parity["floors_allowed"]) * float(outputs[name]["noise_floor"])
            drift = max(*outputs[name]["drift"].values(), outputs[name]["batch_difference"])
            largest = _ROUNDING * max(noise, allowed_drifts * drift)
            if not tolerance <= largest:  # it is larger, or one of them is NaN
                problem = (
                    f"parity.json does not explain the tolerance {tolerance:.2g} of {name}"
                )
                raise BundleError(f"{bundle.path / PROBES}: {problem}; {advice}")
    # A field is missing, or has another type.
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise BundleError(
            f"{bundle.path / 'parity.json'}: records no rounding error (noise_floor); {advice}"
        ) from error


def _list_notes(bundle: Bundle, probes: Probes) -> tuple[str, ...]:
    """List what the *probes* of *bundle* leave open and whether images of a batch may affect each other."""
    notes = []
    if len(probes.images) < FEW_PROBES:
        notes.append(f"only {len(probes.images)} reference images; an export writes more")

    # A tolerance must be small beside the range of the outputs, or it proves little. A value that is the same for
    # all images does not count: it may mask a class.
    for name, tolerance in probes.tolerance.items():
        values = probes.expected[name]
        varies = (values != values[0]).any(axis=0)
        spread = float(np.ptp(values[:, varies])) if varies.any() else 0.0
        if tolerance > WIDE * spread:
            wide = f"{100 * WIDE:.0f} % of the range of the reference outputs, {spread:.2g}"
            notes.append(f"{name}: the tolerance {tolerance:.2g} is above {wide}")

    if bundle.manifest.mixes_images:
        mixing = ", ".join(bundle.manifest.mixes_images)
        notes.append(f"outputs may depend on other images of a batch: {mixing}")
    return tuple(notes)
