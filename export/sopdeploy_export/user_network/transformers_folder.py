"""A folder of Hugging Face Transformers' `save_pretrained`: network, class names and image processor of its files.

Only local files are read, and no code in the folder is run. Weights are safetensors or plain tensors.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sopdeploy.base.environment import import_optional
from sopdeploy.errors import ConfigError, MissingPackageError, WeightsError, first_line, shorten
from sopdeploy_export.pixels.transform import Transform

LOGITS = "logits"  # where an image classifier of this package has them
_CONFIG = "config.json"
# Files of the image processor, from which the rules are read; the first one of version 5
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_WEIGHTS = ("*.safetensors", "*.bin")
_CHUNK = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformersFolder:
    """What a folder holds.

    Attributes:
        network: The image classifier with its weights, in eval mode.
        build: Builds it again, with other weights.
        labels: The class names in the order of the logits.
        transform: The image processor; `None` if the folder has none.
        sha256: Hash of the weight files.
    """

    network: nn.Module
    build: Callable[[], nn.Module]
    labels: tuple[str, ...]
    transform: Transform | None
    sha256: str


def check_is_folder(path: Path) -> None:
    """Raise `WeightsError` unless *path* is a folder with a configuration and weights, without importing torch."""
    if not (path / _CONFIG).is_file() or not any(_weight_files(path)):
        raise WeightsError(
            f"{path}: no folder of save_pretrained of Transformers, with {_CONFIG} and model.safetensors; give such "
            "a folder"
        )


def open_folder(path: Path) -> TransformersFolder:
    """Open the folder *path*.

    Raises `MissingPackageError` without the package, and `WeightsError` if the folder holds no image
    classifier, or not all of its weights.
    """
    check_is_folder(path)
    transformers = import_optional(
        "transformers", "transformers", "transformers", MissingPackageError, str(path)
    )
    transformers.utils.logging.disable_progress_bar()  # the export shows its own steps
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    auto = transformers.AutoModelForImageClassification
    try:
        config = transformers.AutoConfig.from_pretrained(path, **local)
        network, loading = auto.from_pretrained(path, output_loading_info=True, **local)
    except Exception as error:  # of many types, for damaged and for foreign files
        raise WeightsError(
            f"{path}: Transformers cannot load an image classifier from it ({first_line(error)}); save one with "
            "save_pretrained"
        ) from error

    # A head that the files lack would get random weights.
    lacking = sorted(map(str, loading["missing_keys"]))
    if lacking:
        raise WeightsError(
            f"{path}: {shorten(lacking)} is missing, so this is not a trained image classifier; save the "
            "network that was fine-tuned"
        )

    return TransformersFolder(
        network=network.eval(),
        build=lambda: auto.from_config(config),
        labels=tuple(config.id2label[number] for number in range(config.num_labels)),
        transform=_open_processor(path, transformers, local),
        sha256=_hash_weights(path),
    )


def _open_processor(path: Path, transformers: Any, local: dict[str, Any]) -> Transform | None:
    """Open the image processor in the folder *path*; None if there is none."""
    file = next((name for name in _PROCESSORS if (path / name).is_file()), None)
    if file is None:
        return None
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(path, **local)
    except Exception as error:  # of many types
        raise ConfigError(
            f"{path / file} cannot be read ({first_line(error)}); give the transform of the validation, or "
            "preprocessing rules",
            setting="preprocess",
        ) from error
    return Transform(processor, file)


def _weight_files(path: Path) -> list[Path]:
    return sorted(file for pattern in _WEIGHTS for file in path.glob(pattern))


def _hash_weights(path: Path) -> str:
    """Return the sha256 of the weight file or, of several, of their hashes."""
    digests = []
    for file in _weight_files(path):
        digest = hashlib.sha256()
        with file.open("rb") as content:
            while chunk := content.read(_CHUNK):
                digest.update(chunk)
        digests.append(digest.hexdigest())
    return (
        digests[0]
        if len(digests) == 1
        else hashlib.sha256("".join(digests).encode()).hexdigest()
    )
