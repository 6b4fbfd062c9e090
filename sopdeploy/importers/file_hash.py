"""The hash of a file: which weights these are, whatever they are called."""

import hashlib
from pathlib import Path


def sha256(path: Path) -> str:
    """Return the hash of the file at *path* as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
