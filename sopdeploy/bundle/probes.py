"""Probes: images with expected outputs, replayed to check that a runtime computes the exported network.

`sopdeploy verify`, the server at start and engine builds replay them. The file is an `.npz`
with `images` (P, H, W, 3) uint8 and, for each output of the graph, `output_<name>` float32 and
`tolerance_<name>`, an absolute float64 bound derived at export.
"""

import io
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.base.config import StrictModel
from sopdeploy.bundle.folder import PROBES, Bundle
from sopdeploy.bundle.logit_ranges import LogitRanges, absolute_errors, beyond_rounding
from sopdeploy.errors import BundleError, ParityError

ANOTHER_NETWORK = "this runtime does not compute the exported network"
Outputs = Mapping[str, NDArray[np.float32]]
RunImages = Callable[[NDArray[np.uint8]], Outputs]


@dataclass(frozen=True, kw_only=True, slots=True)
class Probes:
    """Probe images (P, H, W, 3) uint8, the expected outputs and their absolute tolerances, by name.

    `masked_rounding` (C,) is that of the logits of all probes (`LogitRanges`), also in the probes that `select`
    returns.
    """

    images: NDArray[np.uint8]
    expected: dict[str, NDArray[np.float32]]
    tolerance: dict[str, float]
    masked_rounding: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        """Measure `masked_rounding`, unless it is given."""
        logits = next(iter(self.expected.values()), None)  # the first output
        if self.masked_rounding is None and logits is not None and logits.ndim == 2:
            masked_rounding = LogitRanges.of(logits).masked_rounding
            object.__setattr__(self, "masked_rounding", masked_rounding)

    def select(self, indices: "NDArray[np.intp] | slice") -> "Probes":
        """Return the probes with these *indices*."""
        expected = {name: values[indices] for name, values in self.expected.items()}
        return replace(self, images=self.images[indices], expected=expected)

    def accepting(self, errors: Mapping[str, float]) -> "Probes":
        """Return these probes with tolerances of at least *errors*, by output."""
        tolerance = {
            name: max(value, errors.get(name, 0.0)) for name, value in self.tolerance.items()
        }
        return replace(self, tolerance=tolerance)

    def repeat_to(self, num_images: int) -> "Probes":
        """Return the first *num_images* of these probes, which are repeated if there are too few.

        Each repetition begins with another one: no part of a batch has the outputs of an
        earlier part.
        """
        rows = np.arange(num_images)
        count = len(self.images)
        return self.select((rows + rows // count) % count)

    def in_whole_batches(self, size: int) -> "Probes":
        """Repeat these probes until they fill whole batches of *size*."""
        num_batches = math.ceil(len(self.images) / size)
        return self.repeat_to(num_batches * size)


class Replay(StrictModel):
    """Result of a replay in batches of `batch`: the largest deviation and the tolerance, by output.

    `num_changed` of the images have another most probable class than the exported network says.
    """

    batch: int
    num_images: int
    deviation: dict[str, float]
    tolerance: dict[str, float]
    num_changed: Annotated[int, pydantic.Field(exclude_if=lambda number: number == 0)] = 0

    def lines(self) -> list[str]:
        """Say how much each output deviates."""
        return [
            f"batch {self.batch}: {name} of {self.num_images} images deviate by "
            f"{deviation:.2g} (allowed {self.tolerance[name]:.2g})"
            for name, deviation in self.deviation.items()
        ]


def write_probes(path: Path, probes: Probes) -> None:
    """Write *probes* to *path*; equal probes give equal bytes."""
    arrays: dict[str, NDArray[np.generic]] = {"images": probes.images}
    for name, values in probes.expected.items():
        arrays[f"output_{name}"] = values
        arrays[f"tolerance_{name}"] = np.array(probes.tolerance[name], dtype=np.float64)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_arrays(content: bytes) -> dict[str, NDArray[Any]]:
    """Read the arrays of an `.npz` file; raises `ValueError` if they need more memory than its size."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = archive.infolist()
    is_compressed = any(file.compress_type != zipfile.ZIP_STORED for file in files)
    if is_compressed or sum(file.file_size for file in files) > len(content):
        raise ValueError("compressed or overlapping arrays")

    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def read_probes(bundle: Bundle) -> Probes:
    """Read the probes of *bundle*; raises `BundleError` if another network could pass them."""
    path = bundle.path / PROBES
    manifest = bundle.manifest
    try:
        arrays = read_arrays(bundle.contents[PROBES])
        names = [key.removeprefix("output_") for key in arrays if key.startswith("output_")]

        probes = Probes(
            images=np.asarray(arrays["images"], dtype=np.uint8),
            expected={
                name: np.asarray(arrays[f"output_{name}"], dtype=np.float32) for name in names
            },
            tolerance={name: float(arrays[f"tolerance_{name}"]) for name in names},
        )
    except Exception as error:  # numpy raises many types for damaged files
        raise BundleError(
            f"{path}: not a file of reference images and outputs; export the bundle again"
        ) from error

    # A tolerance without a limit would let any network pass.
    for name, tolerance in probes.tolerance.items():
        if not 0 <= tolerance < math.inf:
            raise BundleError(
                f"{path}: allows output {name!r} any value; export the bundle again"
            )

    # Every output of the manifest has expected values for every image.
    count = probes.images.shape[0] if probes.images.ndim else 0
    required_shapes = {output.name: (count, *output.shape[1:]) for output in manifest.outputs}
    shapes = {
        name: values.shape
        for name, values in probes.expected.items()
        if name in required_shapes
    }
    has_images = count > 0 and probes.images.shape[1:] == manifest.image_shape
    if not has_images or shapes != required_shapes:
        raise BundleError(
            f"{path}: lacks reference values of an output; export the bundle again"
        )

    # All images differ. They are compared only now that they have pixels: without any, a small
    # file could have any number of images.
    if len({image.tobytes() for image in probes.images}) < count:
        raise BundleError(f"{path}: has the same image twice; export the bundle again")

    return probes


def replay(probes: Probes, run: RunImages, *, batch: int = 1) -> Replay:
    """Run the probes in batches of *batch* and compare every output.

    Raises `ParityError`, also for an output that is not within its tolerance.
    """
    replays = replay_in_turn({batch: probes}, run)
    check_replays(replays)
    return replays[0]


def check_replays(replays: Iterable[Replay]) -> None:
    """Raise `ParityError` for the output in *replays* that deviates most, unless all are within their tolerances."""
    exceeding = [
        (deviation, name, each)
        for each in replays
        for name, deviation in each.deviation.items()
        if deviation > each.tolerance[name]
    ]
    if not exceeding:
        return

    deviation, name, worst = max(exceeding, key=lambda found: found[0])
    raise ParityError(
        f"reference outputs: {name!r} deviates by {deviation:.3g} in a batch of {worst.batch}, but the bound is "
        f"{worst.tolerance[name]:.3g}; the class of {worst.num_changed} of {worst.num_images} images "
        f"changes; {ANOTHER_NETWORK}"
    )


def replay_in_turn(probes_by_batch: Mapping[int, Probes], run: RunImages) -> tuple[Replay, ...]:
    """Run the probes in batches of each size, in turn, and compare every output; return a replay per size.

    So an engine changes its profile from batch to batch, as long as several sizes have images left.
    Raises `ParityError` as `compare_outputs` does.
    """
    sizes = list(probes_by_batch)
    num_batches = [
        math.ceil(len(probes.images) / size) for size, probes in probes_by_batch.items()
    ]

    replays: dict[int, Replay] = {}  # of all batches so far, by their size
    for number in range(max(num_batches)):
        for size in sizes:
            part = probes_by_batch[size].select(slice(number * size, (number + 1) * size))

            if not len(part.images):
                continue

            # The worst of all batches of a size counts.
            compared = compare_outputs(part, run(part.images), size)
            if size in replays:
                before = replays[size]
                worst = {
                    name: max(compared.deviation[name], before.deviation[name])
                    for name in part.tolerance
                }
                compared = compared.model_copy(
                    update={
                        "deviation": worst,
                        "num_images": before.num_images + compared.num_images,
                        "num_changed": before.num_changed + compared.num_changed,
                    }
                )
            replays[size] = compared

    return tuple(replays[size] for size in sizes)


def compare_outputs(probes: Probes, outputs: Outputs, batch: int) -> Replay:
    """Compare the *outputs* of *probes*, which ran at once, with the expected ones.

    *batch* is the batch size of the replay; its last batch may have fewer probes. The largest
    deviation of each output is not compared with its tolerance here (`check_replays`). Raises
    `ParityError` if an output is missing, has another shape or is not finite, except for logits that
    are expected to be minus infinity.
    """
    deviations: dict[str, float] = {}
    num_changed = 0
    for name, expected in probes.expected.items():
        values = outputs.get(name)
        errors = None
        if values is not None and values.shape == expected.shape:
            errors = absolute_errors(values, expected)
        if values is None or errors is None or not np.isfinite(errors).all():
            raise ParityError(
                f"reference outputs: {name!r} is missing, has another shape or is not "
                f"finite; {ANOTHER_NETWORK}"
            )

        if not deviations:  # the first output has the logits (N, C)
            num_changed = int((values.argmax(axis=1) != expected.argmax(axis=1)).sum())
            if probes.masked_rounding is not None:
                errors = beyond_rounding(errors, probes.masked_rounding, probes.tolerance[name])
        deviations[name] = float(errors.max(initial=0.0))

    return Replay(
        batch=batch,
        num_images=len(probes.images),
        deviation=deviations,
        tolerance=probes.tolerance,
        num_changed=num_changed,
    )
