"""A real Ray cluster of two nodes on this machine, one of which is killed while it classifies a part."""

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sopdeploy_service.commands.batch.on_ray import RayOptions
from sopdeploy_service.commands.batch.run import classify
from tests.service.children import START_SECONDS
from tests.service.commands.batch.conftest import OPTIONS, SETTINGS, part_bytes
from tests.service.server.on_ray.clusters import below

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
]

ATTEMPTS = 3
HELD = ("005.jpg", "037.jpg")  # of the first and of the second part


class HeldImage:
    """An image as a named pipe: its reader waits until `release`."""

    def __init__(self, path: Path) -> None:
        self.path, self._body = path, path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        self._pipe: int | None = None

    def has_reader(self) -> bool:
        """Tell whether a process waits for the image; open the pipe if so."""
        if self._pipe is None:
            with contextlib.suppress(OSError):
                self._pipe = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        return self._pipe is not None

    def release(self) -> None:
        """Give the image to its reader, if that is alive, and as a file to later ones."""
        assert self._pipe is not None
        file = self.path.with_suffix(".file")
        file.write_bytes(self._body)
        file.replace(self.path)
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, self._body)
        os.close(self._pipe)


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Any, Any]]:
    """Start a cluster and join it; yield it and its second node.

    Ray gives a node half a minute to start, which is short on a busy machine.
    """
    import ray
    from ray.cluster_utils import Cluster

    for remaining in reversed(range(ATTEMPTS)):
        cluster = Cluster()
        try:
            try:
                cluster.add_node(num_cpus=2, include_dashboard=False)
                second = cluster.add_node(num_cpus=2)
                ray.init(cluster.address, log_to_driver=False)
                cluster.wait_for_nodes(START_SECONDS)
            except Exception:  # Ray raises this type
                if not remaining:
                    raise
                continue
            yield cluster, second
            return
        finally:
            ray.shutdown()
            cluster.shutdown()


def test_a_run_on_two_nodes_of_which_one_is_killed_writes_the_same_rows(
    bundle_path: Path,
    photos: Path,
    tmp_path: Path,
    until: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise Ray writes a token to the home directory
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    for name, milliseconds in (("period", 1000), ("timeout", 5000), ("failure_threshold", 3)):
        unit = "" if name == "failure_threshold" else "_ms"
        monkeypatch.setenv(f"RAY_health_check_{name}{unit}", str(milliseconds))
    copied = shutil.copytree(photos, tmp_path / "photos")
    names = tmp_path / "names.txt"  # without sizes, because those of pipes differ
    names.write_text("\n".join(str(path) for path in sorted(copied.glob("*.jpg"))))
    classify(bundle_path, [str(names)], tmp_path / "here", SETTINGS, OPTIONS)
    held = [HeldImage(copied / name) for name in HELD]

    def kill_a_node(cluster: Any, node: Any) -> None:
        until(lambda: all(one.has_reader() for one in held), 4 * START_SECONDS)
        raylet = node.all_processes["raylet"][0].process.pid
        for process in (raylet, *below(raylet)):  # a machine ends with all of its processes
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        cluster.remove_node(node, allow_graceful=False)
        for one in held:
            one.release()

    with two_nodes() as nodes:
        killer = threading.Thread(target=kill_a_node, args=nodes)
        killer.start()
        options = RayOptions(actors=2)
        found = classify(bundle_path, [str(names)], tmp_path / "out", SETTINGS, OPTIONS, ray=options)
        killer.join(START_SECONDS)
        assert not killer.is_alive()
    assert (found.images, found.classified) == (100, 100)
    assert part_bytes(tmp_path / "out") == part_bytes(tmp_path / "here")
