"""Convert notebooks to Markdown pages for the site and for the tests of commands."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "notebooks"


def notebooks() -> list[Path]:
    """List the notebooks of the documentation."""
    return sorted(FOLDER.glob("*.ipynb"))


def notebook_page(path: Path) -> str:
    """Convert the notebook at *path* to Markdown; raises `ValueError` if it contains outputs."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell.get("outputs"):
            raise ValueError(f"{path}: contains outputs; clear them before committing")
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    parts.insert(1, f"Generated from [the notebook]({path.name}). A test runs all cells.")
    return "\n\n".join(parts) + "\n"
