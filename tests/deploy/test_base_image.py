"""The SBOM of a release names the base image by its digest."""

import json
from pathlib import Path

import base_image
import pytest

DIGEST = "0123456789abcdef" * 4


def test_the_base_image_is_one_component_of_each_sbom(tmp_path: Path) -> None:
    library = {"type": "library", "name": "numpy", "version": "2.0"}
    files = [tmp_path / "cpu.json", tmp_path / "gpu.json"]
    for file in files:
        file.write_text(json.dumps({"bomFormat": "CycloneDX", "components": [library]}))

    for _ in range(2):  # `make sbom` may run again
        base_image.main([f"python:3.12-slim@sha256:{DIGEST}", *map(str, files)])
    for file in files:
        first, added = json.loads(file.read_text())["components"]
        assert first == library
        assert (added["type"], added["name"]) == ("container", "python")
        assert added["version"] == f"sha256:{DIGEST}"
        assert added["purl"] == f"pkg:docker/python@sha256%3A{DIGEST}?tag=3.12-slim"


@pytest.mark.parametrize("image", ["python:3.12-slim", "python@sha256:12", ""])
def test_a_tag_is_refused_because_it_moves(image: str) -> None:
    with pytest.raises(SystemExit, match="error"):
        base_image.component(image)
