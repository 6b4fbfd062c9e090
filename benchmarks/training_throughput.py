"""Image loading for training: images per second and core, cores per GPU, and waiting time of the GPU.

    python benchmarks/training_throughput.py [--quick] [--json]

Synthetic JPEGs of ImageNet's size (500 x 375) and larger ones (1200 x 900), which are filtered noise with the
spectrum and approximate file size of photographs. The rate of one core is measured in processor time of one
thread, alternating between the augmentations. The error of draft decoding is the mean and the 99th percentile
of the difference in gray levels. The waiting time is measured with the real loader, one process per core, and
a simulated GPU. A GPU that takes 2,500 images per second is assumed to have 16 cores; its rate is scaled to
the available cores.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import Result, interleaved, parse, report
from PIL import Image

from sopdeploy.data.augment import Augmentation, AugmentedDataset, RandomResizedCrop, RandomSide
from sopdeploy.data.batches import PILLOW_BLOCKS, load_batches
from sopdeploy.data.datasets.layouts import open_evaluation_images
from sopdeploy.environment import usable_cores
from sopdeploy.images.preprocess import Preprocess

SIZES = {"500x375": ((500, 375), 92), "1200x900": ((1200, 900), 80)}  # size and JPEG quality
AUGMENTATIONS: dict[str, Augmentation] = {
    "random-side": RandomSide(kind="random-side", flip=0.5),
    "random-side draft": RandomSide(kind="random-side", flip=0.5, draft=True),
    "random-resized-crop": RandomResizedCrop(kind="random-resized-crop", flip=0.5),
    "random-resized-crop draft": RandomResizedCrop(kind="random-resized-crop", flip=0.5, draft=True),
}
GPU_RATE, CORES = 2500, 16  # images per second of a GPU, and the cores of its loader
CLASSES = ("a", "b")
BATCH = 32


def photo(size: tuple[int, int], seed: int) -> Image.Image:
    """Generate color noise with the power spectrum of photographs (1 / frequency squared)."""
    width, height = size
    random = np.random.default_rng(seed)
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    fall = 1 / np.maximum(np.hypot(x, y), 1 / max(size))
    gray = np.fft.irfft2(np.fft.rfft2(random.normal(size=(height, width))) * fall, s=(height, width))
    tint = np.fft.irfft2(np.fft.rfft2(random.normal(size=(height, width))) * fall**1.5, s=(height, width))
    planes = [gray / gray.std() + weight * tint / tint.std() for weight in (0.3, 0.0, -0.3)]
    return Image.fromarray(np.clip(128 + 50 * np.stack(planes, axis=-1), 0, 255).astype(np.uint8))


def write(root: Path, size: tuple[int, int], quality: int, count: int) -> int:
    """Write *count* JPEGs below *root*; return their mean size in bytes."""
    lengths = []
    for number in range(count):
        path = root / CLASSES[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(size, number).save(path, "JPEG", quality=quality)
        lengths.append(path.stat().st_size)
    return int(statistics.mean(lengths))


def view(root: Path, augmentation: Augmentation, epoch: int = 0) -> AugmentedDataset:
    """Open the images below *root* with *augmentation*."""
    return AugmentedDataset(open_evaluation_images(root, CLASSES), augmentation, Preprocess(), 0, epoch)


def per_core(root: Path, runs: int) -> dict[str, float]:
    """Measure the images per second of one core for each augmentation."""
    views = {name: (view(root, augmentation), PILLOW_BLOCKS) for name, augmentation in AUGMENTATIONS.items()}
    views["random-resized-crop, without memory reuse"] = (view(root, AUGMENTATIONS["random-resized-crop"]), 0)

    def pass_over(images: AugmentedDataset, blocks: int) -> None:
        Image.core.set_blocks_max(blocks)  # type: ignore[attr-defined]
        for index in range(len(images)):
            images[index]

    sides = [lambda pair=pair: pass_over(*pair) for pair in views.values()]
    taken = interleaved(sides, runs=runs, clock=time.process_time)
    return {
        name: len(pair[0]) / statistics.median(seconds)
        for (name, pair), seconds in zip(views.items(), taken, strict=True)
    }


def drift(root: Path, name: str) -> tuple[float, float, float]:
    """Compare draft with exact decoding for the augmentation *name*.

    Returns the mean and the 99th percentile of the difference in gray levels over all changed images, and the
    fraction of changed images.
    """
    plain, draft = view(root, AUGMENTATIONS[name]), view(root, AUGMENTATIONS[f"{name} draft"])
    differences = [
        np.abs(plain[index][0].astype(int) - draft[index][0].astype(int)).ravel()
        for index in range(len(plain))
    ]
    changed = [difference for difference in differences if difference.any()]
    if not changed:
        return 0.0, 0.0, 0.0
    levels = np.concatenate(changed)
    return float(levels.mean()), float(np.percentile(levels, 99)), len(changed) / len(differences)


def waiting(root: Path, augmentation: Augmentation, batches: int) -> tuple[float, float]:
    """Measure the fraction of time that a simulated GPU waits for the loader, and its images per second."""
    workers = usable_cores()
    step = BATCH / (GPU_RATE * workers / CORES)
    images = view(root, augmentation)
    batch_indices = [
        [(n * BATCH + i) % len(images) for i in range(BATCH)] for n in range(batches + 2 * workers)
    ]
    waited, start, since = 0.0, 0.0, 0.0
    for number, _ in enumerate(load_batches(images, batch_indices, workers, torch.device("cpu"))):
        now = time.perf_counter()
        if number == 2 * workers:  # the first batches wait for the processes to start
            start = now
        elif number > 2 * workers:
            waited += now - since
        time.sleep(step)
        since = time.perf_counter()
    whole = since - start
    return waited / whole, batches * BATCH / whole


def main() -> None:
    arguments = parse(__doc__)
    count, runs, batches = (16, 3, 8) if arguments.quick else (64, 7, 40)
    rows: list[Result] = []
    for name, (size, quality) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            length = write(root, size, quality, count)
            rates = per_core(root, runs)
            drifts = {name: drift(root, name) for name in ("random-side", "random-resized-crop")}
            waits = {name: waiting(root, AUGMENTATIONS[name], batches) for name in AUGMENTATIONS}
        rows += results(f"{name}, {length / 1e3:.0f} kB", rates, drifts, waits, runs)
    report(rows, as_json=arguments.json)


def results(
    size: str,
    rates: dict[str, float],
    drifts: dict[str, tuple[float, float, float]],
    waits: dict[str, tuple[float, float]],
    runs: int,
) -> list[Result]:
    """Build the results of one image size."""
    rows = [
        Result(
            case=f"{size}: {name}, images/s per core",
            against=f"{CORES} cores feed {GPU_RATE}/s",
            ours=rate,
            other=GPU_RATE / CORES,
            unit="images/s",
            runs=runs,
        )
        for name, rate in rates.items()
    ]
    for name, (mean, high, fraction) in drifts.items():
        for what, value, unit in (
            ("images changed by draft", 100 * fraction, "%"),
            ("mean difference of changed images", mean, "levels"),
            ("99th percentile of the difference", high, "levels"),
        ):
            rows.append(Result(case=f"{size}: {name}, {what}", ours=value, unit=unit, runs=runs))
    for name, (fraction, rate) in waits.items():
        rows.append(Result(case=f"{size}: {name}, GPU waits", ours=100 * fraction, unit="%", runs=1))
        rows.append(Result(case=f"{size}: {name}, GPU receives", ours=rate, unit="images/s", runs=1))
    return rows


if __name__ == "__main__":
    main()
