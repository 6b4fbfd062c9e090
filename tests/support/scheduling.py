"""Distribute tests over xdist workers: which tests stay together, and which start first.

Tests of one file share fixtures and run on one worker. So do all tests of the exporter, which
share certificates, and of training, which share the process that forks others. Files without
shared fixtures are split into single tests to keep all workers busy at the end. The service
tests form one group because they mostly wait for servers while the other workers compute.
"""

from typing import Any

from xdist.scheduler import LoadFileScheduling

ONE_GROUP_PER_FOLDER = ("tests/export/", "tests/service/", "tests/sopdeploy/training/")
ONE_GROUP_PER_TEST = (
    "tests/sopdeploy/training/test_recipe_walks.py",
    "tests/attacks/test_planted_networks.py",
    "tests/sweep/test_catalog_sweep.py",
)
LONGEST_FIRST = (
    *ONE_GROUP_PER_FOLDER,
    *ONE_GROUP_PER_TEST,
    "tests/test_walk.py",
    "tests/attacks/test_certificate.py",
    "tests/sopdeploy/weights/",
    "tests/test_",
)


class GroupScheduling(LoadFileScheduling):  # type: ignore[misc]
    """Assign one file at a time to each worker, except for the groups named above."""

    def __init__(self, config: Any, log: Any) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(ONE_GROUP_PER_TEST):
            return nodeid
        folders = (folder for folder in ONE_GROUP_PER_FOLDER if nodeid.startswith(folder))
        return next(folders, nodeid.partition("::")[0])

    def remove_node(self, node: Any) -> str | None:
        """Forget the completed groups of a crashed worker: a worker that gets one of them waits forever."""
        self.assigned_work[node] = {
            scope: tests
            for scope, tests in self.assigned_work[node].items()
            if not all(tests.values())
        }
        crashed: str | None = super().remove_node(node)
        return crashed

    def schedule(self) -> None:
        """Assign groups; a worker that replaces a crashed one learns at once that no other group follows."""
        super().schedule()
        for node in self.nodes:
            self._reschedule(node)


def start_position(nodeid: str) -> int:
    """Return the sort key of a test: groups that take long start first."""
    positions = (i for i, prefix in enumerate(LONGEST_FIRST) if nodeid.startswith(prefix))
    return next(positions, len(LONGEST_FIRST))
