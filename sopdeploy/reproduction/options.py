"""Options of `sopdeploy reproduce`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic

from sopdeploy.config import Options

if TYPE_CHECKING:
    from sopdeploy.reproduction.tables import PrintedTable

ReproductionScale = Literal["paper", "small"]


class ReproduceOptions(Options):
    """Which rows of a table are run, how often, at which scale and on which images."""

    rows: str | None = None
    """Run only these rows, ids separated by commas, and those they need; none writes the page alone."""
    seeds: Annotated[int | None, pydantic.Field(ge=1)] = None
    """Runs per row: seeds 0, 1 and so on; by default as many as in the paper."""
    scale: ReproductionScale = "paper"
    """small trains narrow networks on few small images, in minutes on a CPU."""
    data: Path | None = None
    """Images: class folders or an official layout. At the small scale any images, by default the bundled
    digits."""
    set: tuple[str, ...] = ()
    """Override a value of all recipes, such as threads=4; repeatable."""
    out: Path = Path("runs/reproduce")
    """Folder of runs and pages."""

    def runs_per_row(self, table: "PrintedTable") -> int:
        """Return `seeds`, or the number of runs that the paper of *table* averages; 1 at the small scale."""
        return self.seeds or (table.seeds if self.scale == "paper" else 1)

    def folder(self, table: "PrintedTable") -> Path:
        """Return the folder of the runs and the page of *table*."""
        return self.out / f"{table.id}-{self.scale}"
