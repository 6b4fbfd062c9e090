"""Scenes with at most two of four objects, drawn by the script of the page on several classes per image."""

import os
from pathlib import Path

from tests.docs.reading import ROOT, blocks

(SCRIPT,) = (
    block for block in blocks(ROOT / "docs" / "train.md", "python") if "scenes" in block
)
CLASSES = ("ball", "box", "cross", "ring")


def draw_scenes(folder: Path, *, count: int = 240, seed: int = 0) -> Path:
    """Write *count* images of 48 x 48 pixels and their `labels.csv` to *folder*."""
    script = SCRIPT.replace("range(240)", f"range({count})").replace(
        "default_rng(0)", f"default_rng({seed})"
    )
    before = Path.cwd()
    folder.mkdir(parents=True)
    try:
        os.chdir(folder)
        exec(script.replace('"scenes"', '"."'), {})  # noqa: S102  # our own page
    finally:
        os.chdir(before)
    return folder
