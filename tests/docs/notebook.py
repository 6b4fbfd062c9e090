"""Run the cells of a notebook in order in one namespace, as `python -m tests.docs.notebook FILE` does."""

import json
import sys
from pathlib import Path


def code_cells(path: Path) -> list[str]:
    """Return the source of every cell of code."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(path: Path) -> None:
    """Run every cell; the first error ends it, its cell named in the traceback."""
    names: dict[str, object] = {"__name__": "__main__"}
    for number, source in enumerate(code_cells(path), 1):
        exec(compile(source, f"cell {number}", "exec"), names)  # noqa: S102 - ours


if __name__ == "__main__":
    run(Path(sys.argv[1]))
