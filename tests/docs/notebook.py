"""Run the cells of a notebook in order in one namespace, as `python -m tests.docs.notebook FILE` does."""

import json
import sys
from pathlib import Path


def code_cells(path: Path) -> list[str]:
    """List the source of all code cells."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(path: Path) -> None:
    """Run all cells in one namespace; a traceback contains the cell number."""
    names: dict[str, object] = {"__name__": "__main__"}
    for number, source in enumerate(code_cells(path), 1):
        exec(compile(source, f"cell {number}", "exec"), names)  # noqa: S102 - our own code


if __name__ == "__main__":
    run(Path(sys.argv[1]))
