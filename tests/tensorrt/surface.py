"""The names of each TensorRT release, recorded from its Python bindings in tensorrt_surface.json."""

import json
from pathlib import Path

SURFACE = json.loads((Path(__file__).parent / "tensorrt_surface.json").read_text())


def members(kind: str, version: str) -> frozenset[str] | None:
    """List the names of *kind* in *version*; None if the class does not exist."""
    entry = SURFACE["classes"][kind]
    if version in entry and entry[version] is None:
        return None
    return frozenset(f"{entry['all']} {entry.get(version, '')}".split())
