"""A few random images in the layouts that the data sources read."""

import hashlib
import io
import pickle  # noqa: TID251  # the official files are pickles
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sopdeploy.data.datasets.small import cifar_class


def jpeg(seed: int, size: tuple[int, int] = (40, 32), ending: str = "JPEG") -> bytes:
    """Encode an image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, ending)
    return stream.getvalue()


def write_classes(root: Path, labels: Sequence[str], each: int = 2, seed: int = 0) -> Path:
    """Write *each* images of every class below *root*, all different."""
    for number, label in enumerate(labels):
        folder = root / label
        folder.mkdir(parents=True)
        for count in range(each):
            (folder / f"{count}.jpg").write_bytes(jpeg(seed + 1000 * number + count))
    return root


def write_photos(root: Path) -> Path:
    """Write train/ and val/ with two classes of four and two images."""
    write_classes(root / "train", ("cat", "dog"), 4)
    write_classes(root / "val", ("cat", "dog"), 2, seed=500)
    return root


def tar_of(folder: Path, path: Path, name: str = ".") -> Path:
    """Write the content of *folder* to the tar file *path*, below *name*."""
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname=name)
    return path


def write_pickle(path: Path, content: Any, protocol: int = 4) -> str:
    """Write a pickle; return its md5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = pickle.dumps(content, protocol=protocol)
    path.write_bytes(data)
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def write_cifar(root: Path, kind: str, monkeypatch: Any) -> Path:
    """Write CIFAR's official layout below *root* and let torchvision accept its checksums."""
    official, rng = cifar_class(kind), np.random.default_rng(0)
    classes = 10 if kind == "cifar10" else 100
    base, key = root / official.base_folder, "labels" if classes == 10 else "fine_labels"
    for attribute in ("train_list", "test_list"):
        files = []
        for name, _ in getattr(official, attribute):
            pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
            labels = rng.integers(0, classes, 4).tolist()
            files.append([name, write_pickle(base / name, {"data": pixels, key: labels})])
        monkeypatch.setattr(official, attribute, files)
    meta = dict(official.meta)
    names = [f"class {number}" for number in range(classes)]
    meta["md5"] = write_pickle(base / meta["filename"], {meta["key"]: names})
    monkeypatch.setattr(official, "meta", meta)
    return base


def planes(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Make random images (count, 3 * side * side), plane by plane."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3 * side * side), dtype=np.uint8)


def write_small_imagenet(root: Path, side: int = 64, classes: int = 3) -> Path:
    """Write two training batches and a validation batch in the official layout."""
    for name, seed in {"train_data_batch_1": 1, "train_data_batch_2": 2, "val_data": 3}.items():
        labels = [1 + number % classes for number in range(2 * classes)]
        content = {"data": planes(2 * classes, side, seed), "labels": labels}
        if name != "val_data":
            content["mean"] = content["data"].mean(axis=0)
        write_pickle(root / name, content)
    return root


def write_places(root: Path) -> Path:
    """Write Places365's original layout with three classes."""
    lists: dict[str, list[str]] = {
        "places365_train_standard": [],
        "places365_val": [],
        "categories_places365": [],
    }
    for number, name in enumerate(("/a/abbey", "/a/apartment/outdoor", "/b/bar")):
        lists["categories_places365"].append(f"{name} {number}")
        images = {f"data_256{name}/{count:08}.jpg": 100 * number + count for count in range(4)}
        images[f"val_256/Places365_val_{number:08}.jpg"] = 7000 + number
        for file, seed in images.items():
            path = root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(seed, (64, 64)))
            part = "places365_val" if file.startswith("val") else "places365_train_standard"
            lists[part].append(f"{file.removeprefix('data_256').removeprefix('val_256/')} {number}")
    for file, lines in lists.items():
        (root / f"{file}.txt").write_text("\n".join(lines) + "\n")
    return root
