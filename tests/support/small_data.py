"""A few random images in the layouts that the data sources read."""

import hashlib
import io
import pickle  # noqa: TID251  # the official files are pickles
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from PIL import Image


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


def write_cifar(root: Path, kind: str, monkeypatch: Any) -> Path:
    """Write CIFAR's official layout below *root* and let torchvision accept its checksums."""

    def write_pickle(path: Path, content: Any) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content, protocol=4))
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()

    official: Any = getattr(torchvision.datasets, kind.upper())
    rng = np.random.default_rng(0)
    classes = 10 if kind == "cifar10" else 100
    base = root / official.base_folder
    key = "labels" if classes == 10 else "fine_labels"
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


def write_lists(
    root: Path, texts: dict[str, str], images: Sequence[str], size: tuple[int, int]
) -> None:
    """Write text files, and different JPEGs of *size*, below *root*."""
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for seed, name in enumerate(images):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(seed, size))


def write_places(root: Path, monkeypatch: Any) -> Path:
    """Write three classes in Places365's layout and let torchvision accept their lists."""
    names = ("/a/abbey", "/a/apartment/outdoor", "/b/bar")
    train = [
        f"{name}/{count:08}.jpg {number}"
        for number, name in enumerate(names)
        for count in range(4)
    ]
    held_out = [f"Places365_val_{number:08}.jpg {number}" for number in range(3)]
    lists = {
        "categories_places365.txt": [f"{name} {number}" for number, name in enumerate(names)],
        "places365_train_standard.txt": train,
        "places365_val.txt": held_out,
    }
    images = [f"data_256_standard{line.split()[0]}" for line in train]
    images += [f"val_256/{line.split()[0]}" for line in held_out]
    write_lists(
        root, {name: "\n".join(lines) + "\n" for name, lines in lists.items()}, images, (64, 64)
    )
    monkeypatch.setattr("torchvision.datasets.Places365._check_integrity", lambda *_: True)
    return root


def write_aircraft(root: Path) -> Path:
    """Write six training and three test images of three classes in the layout of FGVC-Aircraft."""
    variants = ["707-320", "Cessna 172", "F-16A/B"]
    numbers = [f"{1000 + index:07}" for index in range(9)]
    lines = [f"{number} {variants[index % 3]}\n" for index, number in enumerate(numbers)]
    texts = {
        "variants.txt": "\n".join(variants) + "\n",
        "images_variant_trainval.txt": "".join(lines[:6]),
        "images_variant_test.txt": "".join(lines[6:]),
    }
    images = [f"images/{number}.jpg" for number in numbers]
    write_lists(root / "fgvc-aircraft-2013b" / "data", texts, images, (24, 20))
    return root
