"""`make sbom BASE_IMAGE=python:3.12-slim-bookworm@sha256:...`: name the base image in the SBOMs of the images."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PINNED = re.compile(r"(?P<name>[^@]+)@sha256:(?P<digest>[0-9a-f]{64})")


def component(image: str) -> dict[str, Any]:
    """Describe *image* in CycloneDX; it must be pinned, because a tag moves."""
    pinned = PINNED.fullmatch(image)
    if pinned is None:
        raise SystemExit(f"error: {image}: not pinned; write it as NAME@sha256:DIGEST")

    # The tag is a qualifier: the package is the repository.
    repository, _, tag = pinned["name"].partition(":")
    version = f"sha256:{pinned['digest']}"
    url = f"pkg:docker/{repository}@sha256%3A{pinned['digest']}" + (
        f"?tag={tag}" if tag else ""
    )
    return {
        "type": "container",
        "bom-ref": url,
        "name": repository,
        "version": version,
        "purl": url,
        "hashes": [{"alg": "SHA-256", "content": pinned["digest"]}],
    }


def main(arguments: Sequence[str]) -> None:
    """Add the image, the first of *arguments*, to the SBOMs that follow."""
    image, *files = arguments
    added = component(image)
    for path in map(Path, files):
        bom = json.loads(path.read_text(encoding="utf-8"))
        others = [one for one in bom.get("components", []) if one.get("type") != "container"]
        bom["components"] = [*others, added]
        path.write_text(json.dumps(bom, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
