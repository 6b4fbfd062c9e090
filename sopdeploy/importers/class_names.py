"""Class names of an imported network: from the user's file, of a known data set, or numbers."""

import importlib
import json
from pathlib import Path

from sopdeploy.errors import ConfigError
from sopdeploy.importers.source import Translation

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MOST_BYTES = 1 << 22


def class_names(found: Translation, file: Path | None) -> tuple[tuple[str, ...], str]:
    """Return a name per class in the order of the network's answers, and where they are from.

    *file* holds one name a line, or is a `.json` list. Raises `ConfigError` where there are not as many
    names as classes, or one twice.
    """
    count = found.num_classes
    if file is not None:
        names = read_names(file)
        if len(names) != count:
            raise ConfigError(f"--labels {file}: {len(names)} names for {count} classes; give one a class")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"--labels {file}: {twice!r} stands in it twice; names must differ")
        return names, str(file)
    if found.labels == "cifar10" and count == len(CIFAR10):
        return CIFAR10, "CIFAR-10"
    if found.labels == "imagenet" and count == 1000:
        return imagenet(), "ImageNet, as torchvision names them"
    width = len(str(count - 1))
    return tuple(f"class {index:0{width}}" for index in range(count)), "numbers; give --labels for names"


def read_names(file: Path) -> tuple[str, ...]:
    """Return the names in *file*."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ConfigError(f"--labels {file}: larger than {MOST_BYTES >> 20} MiB; give one name a line")
        content = file.read_text(encoding="utf-8")
        names = json.loads(content) if file.suffix == ".json" else content.split("\n")
    except (OSError, ValueError) as problem:
        raise ConfigError(f"--labels {file}: cannot be read ({problem})") from problem
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"--labels {file}: not a list of names")
    return tuple(name.strip() for name in names if name.strip())


def imagenet() -> tuple[str, ...]:
    """Return the names of ImageNet's classes in the order of their WordNet numbers."""
    weights = importlib.import_module("torchvision.models").ResNet18_Weights.IMAGENET1K_V1
    return tuple(weights.meta["categories"])
