"""Training's loading: pictures per second and core, the cores that a GPU needs, and how long it waits.

    python benchmarks/training_throughput.py [--quick] [--json]

JPEGs of ImageNet's size (500 x 375) and larger ones (1200 x 900) are written as files and as one archive;
they are filtered noise with the spectrum of photographs and about their bytes. One core is measured by the
processor time of one thread, each way of cropping in turn with the others. Draft's drift is the mean and the
99th percentile of the difference in grey levels. The wait is that of the real loader, with a process per
core, before a step of a GPU that takes 2,500 pictures a second from 16 cores: the share of an epoch in which
that GPU would stand still, scaled to the cores that there are.
"""

import io
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import measure
import numpy as np
import torch
from PIL import Image

from sopdeploy.data.augment import Augmentation, AugmentedDataset, RandomResizedCrop, RandomSide
from sopdeploy.data.batches import PILLOW_BLOCKS, load_batches
from sopdeploy.data.datasets.folder import open_classes
from sopdeploy.images.preprocess import Preprocess

SIZES = {"500x375": ((500, 375), 92), "1200x900": ((1200, 900), 80)}  # and the quality of the JPEGs
WAYS: dict[str, Augmentation] = {
    "random-side": RandomSide(kind="random-side", flip=0.5),
    "random-side draft": RandomSide(kind="random-side", flip=0.5, draft=True),
    "random-resized-crop": RandomResizedCrop(kind="random-resized-crop", flip=0.5),
    "random-resized-crop draft": RandomResizedCrop(kind="random-resized-crop", flip=0.5, draft=True),
}
WANTED, CORES = 2500, 16  # pictures a second, of so many cores
CLASSES = ("a", "b")
BATCH = 32


def photo(size: tuple[int, int], seed: int) -> Image.Image:
    """Return colour noise whose power falls with the square of the frequency, as a photograph's does."""
    width, height = size
    random = np.random.default_rng(seed)
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    fall = 1 / np.maximum(np.hypot(x, y), 1 / max(size))
    grey = np.fft.irfft2(np.fft.rfft2(random.normal(size=(height, width))) * fall, s=(height, width))
    tint = np.fft.irfft2(np.fft.rfft2(random.normal(size=(height, width))) * fall**1.5, s=(height, width))
    planes = [grey / grey.std() + weight * tint / tint.std() for weight in (0.3, 0.0, -0.3)]
    return Image.fromarray(np.clip(128 + 50 * np.stack(planes, axis=-1), 0, 255).astype(np.uint8))


def write(root: Path, size: tuple[int, int], quality: int, count: int) -> int:
    """Write *count* JPEGs below *root*/files and into *root*/all.tar; return their mean size in bytes."""
    lengths = []
    with tarfile.open(root / "all.tar", "w") as archive:
        for number in range(count):
            stream = io.BytesIO()
            photo(size, number).save(stream, "JPEG", quality=quality)
            name, data = f"{CLASSES[number % 2]}/{number}.jpg", stream.getvalue()
            path = root / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
            lengths.append(len(data))
    return int(statistics.mean(lengths))


def view(root: Path, way: Augmentation, source: str = "files", epoch: int = 0) -> AugmentedDataset:
    """Return the pictures as training sees them."""
    return AugmentedDataset(open_classes(root / source, CLASSES), way, Preprocess(), 0, epoch)


def per_core(root: Path, runs: int) -> dict[str, float]:
    """Return the pictures that one core prepares in a second, for each way and beside them."""
    views = {name: (view(root, way), PILLOW_BLOCKS) for name, way in WAYS.items()}
    views["random-resized-crop, memory given back"] = (view(root, WAYS["random-resized-crop"]), 0)
    views["random-resized-crop from a tar"] = (
        view(root, WAYS["random-resized-crop"], "all.tar"),
        PILLOW_BLOCKS,
    )

    def pass_over(pictures: AugmentedDataset, blocks: int) -> None:
        Image.core.set_blocks_max(blocks)  # type: ignore[attr-defined]
        for index in range(len(pictures)):
            pictures[index]

    sides = [lambda pair=pair: pass_over(*pair) for pair in views.values()]
    taken = measure.interleaved(sides, runs=runs, clock=time.process_time)
    return {
        name: len(pair[0]) / statistics.median(seconds)
        for (name, pair), seconds in zip(views.items(), taken, strict=True)
    }


def drift(root: Path, name: str) -> tuple[float, float, float]:
    """Return mean and 99th percentile of the grey levels by which draft is off, and the share it changes."""
    plain, draft = view(root, WAYS[name]), view(root, WAYS[f"{name} draft"])
    gaps = [
        np.abs(plain[index][0].astype(int) - draft[index][0].astype(int)).ravel()
        for index in range(len(plain))
    ]
    changed = [gap for gap in gaps if gap.any()]
    if not changed:
        return 0.0, 0.0, 0.0
    together = np.concatenate(changed)
    return float(together.mean()), float(np.percentile(together, 99)), len(changed) / len(gaps)


def waiting(root: Path, way: Augmentation, batches: int) -> tuple[float, float]:
    """Return the share of time a simulated GPU waits for the loader, and the pictures it got a second."""
    workers = len(os.sched_getaffinity(0))
    step = BATCH / (WANTED * workers / CORES)
    pictures = view(root, way)
    order = [[(n * BATCH + i) % len(pictures) for i in range(BATCH)] for n in range(batches + 2 * workers)]
    waited, start, since = 0.0, 0.0, 0.0
    for number, _ in enumerate(load_batches(pictures, order, workers, torch.device("cpu"))):
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
    arguments = measure.parse(__doc__)
    count, runs, batches = (16, 3, 8) if arguments.quick else (64, 7, 40)
    rows = []
    for name, (size, quality) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            length = write(root, size, quality, count)
            rates = per_core(root, runs)
            drifts = {way: drift(root, way) for way in ("random-side", "random-resized-crop")}
            waits = {way: waiting(root, WAYS[way], batches) for way in WAYS}
        rows.append({"size": name, "bytes": length, "rates": rates, "drift": drifts, "waiting": waits})
    if arguments.json:
        measure.report([], as_json=True, rows=rows)
        return
    measure.report([], as_json=False)
    for row in rows:
        print(f"\n{row['size']}, {row['bytes'] / 1e3:.0f} kB a picture")
        for way, rate in row["rates"].items():
            print(
                f"  {way:42}{rate:7.0f} pictures/s a core, {CORES} cores {CORES * rate:6.0f}, "
                f"cores for {WANTED}/s {WANTED / rate:5.1f}"
            )
        for way, (mean, high, share) in row["drift"].items():
            print(
                f"  draft changes {share:4.0%} of {way}: mean {mean:.2f}, 99 % within {high:.0f} grey levels"
            )
        for way, (share, rate) in row["waiting"].items():
            print(f"  {way:42} the GPU waits {share:4.0%} of the time and gets {rate:.0f} pictures/s")


if __name__ == "__main__":
    main()
