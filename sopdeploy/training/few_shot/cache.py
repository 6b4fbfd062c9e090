"""Features of photographs, kept between runs in the user's cache folder.

An entry is a checksum and a safetensors file. Its name is a hash of the `file_hash` of the
photograph and of everything else that determines its features. A damaged entry is computed
again. An unusable folder turns the cache off.
"""

import hashlib
import os
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sopdeploy.base.environment import installed
from sopdeploy.base.files import features_folder, read_checked, write_checked
from sopdeploy.data.photos.copies import SMALL
from sopdeploy.models.second_order_head import POOLED_HEAD, SecondOrderHead
from sopdeploy.training.settings.head import FeatureSettings

Entry = list[NDArray[Any]]
LIMIT_BYTES = 10**9  # about 6,000 photographs of EfficientNet-Lite0
# The version of the format: entries with another content have other names.
ENTRY_CONTENT = f"hash of the pixels, image of {SMALL} x {SMALL} pixels, own vector, maps"
_PACKAGES = ("sopdeploy", "torch", "pillow", "pillow-heif", "timm")


class FeatureCache:
    """Entries by photograph for one network, in `features_folder`.

    When the entries exceed *limit* bytes, the least recently used ones are deleted, but none that
    this run has used.
    """

    def __init__(
        self, network: SecondOrderHead, settings: FeatureSettings, limit: int = LIMIT_BYTES
    ) -> None:
        self.folder = features_folder()
        self.limit = limit
        self.used: set[str] = set()  # names of the entries of this run
        # `identity` has no version of other packages, so the entries of a network with modules of
        # these are neither read nor written.
        classes = {base for module in network.modules() for base in type(module).__mro__[:-1]}
        packages = {base.__module__.split(".")[0] for base in classes}
        self.is_stale = not packages <= {*_PACKAGES, "torchvision", "abc"}
        # The XDG specification ignores relative paths.
        self.writable = self.folder.is_absolute() and not self.is_stale
        self.bytes = sum(size for _, size, _ in self._entries())
        self.identity = hash_network(network, settings)

    def path(self, file_hash: int) -> Path:
        """Return the path of the entry of the photograph whose file has the hash *file_hash*."""
        name = hashlib.sha256(self.identity + file_hash.to_bytes(8, "big", signed=True))
        return self.folder / f"{name.hexdigest()}.features"

    def has(self, file_hash: int) -> bool:
        """Tell whether there is an entry, which may be damaged."""
        return not self.is_stale and self.path(file_hash).exists()

    def mark_used(self, file_hash: int) -> Path:
        """Mark an entry, which may be missing, as used by this run; return its path."""
        path = self.path(file_hash)
        self.used.add(path.name)
        with suppress(OSError):
            os.utime(path)
        return path

    def read(self, path: Path) -> Entry | None:
        """Read an entry; None if it is missing or damaged, or the cache is stale."""
        if self.is_stale:
            return None
        content = read_checked(path, self.limit)
        if content is None:
            return None
        try:
            arrays = load(content)
        except SafetensorError:
            return None
        return [arrays[str(number)] for number in range(len(arrays))]

    def write(self, path: Path, entry: Entry) -> None:
        """Write an entry; stop writing any if the folder is not writable or full of entries of this run."""
        size = sum(array.nbytes for array in entry)
        if self.writable and self.bytes + size > self.limit:
            # A tenth of the limit more than needed is deleted, so that many more entries fit
            # before the next time.
            self._delete_oldest(self.limit * 9 // 10 - size)
            self.writable = self.bytes + size <= self.limit
        if not self.writable:
            return

        try:
            # safetensors writes the bytes of an array in the order in which they are in memory.
            content = save(
                {str(number): np.ascontiguousarray(array) for number, array in enumerate(entry)}
            )
            write_checked(path, content)
            self.bytes += path.stat().st_size
        except OSError:
            self.writable = False

    def _entries(self) -> list[tuple[float, int, Path]]:
        """List (time of the last use, bytes, path) of the files in the folder, the oldest use first."""
        entries = []
        with suppress(OSError):
            for path in self.folder.iterdir():
                with suppress(OSError):  # another run deletes entries, too
                    status = path.stat()
                    entries.append((status.st_mtime, status.st_size, path))
        return sorted(entries)

    def _delete_oldest(self, limit: int) -> None:
        """Delete the least recently used entries, but none of this run, until at most *limit* bytes remain."""
        entries = self._entries()
        self.bytes = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if self.bytes <= limit:
                return
            if path.name not in self.used:
                with suppress(OSError):
                    path.unlink()
                    self.bytes -= size


def hash_network(network: SecondOrderHead, settings: FeatureSettings) -> bytes:
    """Hash all that determines the features: network, decoding, preprocessing, versions, processor.

    The head is left out: it is computed from the features.
    """
    # Kernels of another processor, or for another number of threads, round differently.
    device = next(network.parameters()).device
    processor = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)

    facts = [
        ENTRY_CONTENT,
        settings.model.model_dump_json(),
        settings.preprocess.model_dump_json(),
        processor,
    ]
    facts += [*installed(_PACKAGES).values(), *network.maps]  # versions, and names of the taps
    digest = hashlib.sha256(repr(facts).encode())

    # The code that decodes images.
    for file in sorted(files("sopdeploy.images").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())

    # The modules of the network, then their weights and buffers.
    for name, module in network.named_modules():
        if not _is_of_head(name):
            digest.update(
                f"{name} {type(module).__qualname__} {module.extra_repr()}\n".encode()
            )
    for name, tensor in network.state_dict().items():
        if not _is_of_head(name):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())

    return digest.digest()


def _is_of_head(name: str) -> bool:
    """Tell whether the module or tensor *name* belongs to the head."""
    return name.split(".")[0] == POOLED_HEAD
