"""Which tests stay together where several processes run them, and which are begun first.

A file's tests share what its fixtures make, those of the export also their proofs; a process that gets half
of them makes all of it again. Where tests share nothing each goes alone, so that no process waits at the end.
Those of the service stay together because they wait, for servers and clocks, while the others compute: three
processes that wait at once would leave the cores idle.
"""

from typing import Any

from xdist.scheduler import LoadFileScheduling

TOGETHER = ("tests/export/", "tests/service/")
APART = ("tests/sopdeploy/training/test_recipe_walks.py", "tests/sweep/test_catalog_sweep.py")
LONG = (
    *TOGETHER,
    *APART,
    "tests/test_walk.py",
    "tests/attacks/test_certificate.py",
    "tests/sopdeploy/training/test_train_killed.py",
    "tests/sopdeploy/test_train",
    "tests/sopdeploy/importers/",
    "tests/benchmarks/",
    "tests/test_",
)


class ByWhatIsShared(LoadFileScheduling):  # type: ignore[misc]
    """Gives a process a whole file at a time, more or less where that is named above, in their order."""

    def __init__(self, config: Any, log: Any) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(APART):
            return nodeid
        shared = (folder for folder in TOGETHER if nodeid.startswith(folder))
        return next(shared, nodeid.partition("::")[0])


def when(nodeid: str) -> int:
    """Return the place of a test in the order: long work first."""
    return next((place for place, start in enumerate(LONG) if nodeid.startswith(start)), len(LONG))
