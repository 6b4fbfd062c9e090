"""The page of a notebook: its cells as Markdown, for the site and for the tests that read commands."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "notebooks"


def notebooks() -> list[Path]:
    """Return every notebook of the documentation."""
    return sorted(FOLDER.glob("*.ipynb"))


def notebook_page(path: Path) -> str:
    """Return the notebook at *path* as Markdown, code in fences; raises `ValueError` for one with outputs."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell.get("outputs"):
            raise ValueError(f"{path}: holds outputs; clear them, they are no source")
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    parts.insert(1, f"Generated from [the notebook]({path.name}), which Jupyter opens; a test runs it.")
    return "\n\n".join(parts) + "\n"
