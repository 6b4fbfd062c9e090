"""A real Ray cluster of two nodes on this machine, one of which is killed while it classifies a part."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sopdeploy_service.commands.batch.options import RayOptions
from tests.service.children import START_SECONDS
from tests.service.commands.batch.conftest import OPTIONS, SETTINGS, classify, part_bytes
from tests.service.server.on_ray.clusters import below

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),
]

ATTEMPTS = 3
HELD = ("005.jpg", "037.jpg")  # of the first and of the second part


class HeldImages(ThreadingHTTPServer):
    """Serves the images of *folder*; `requested` has the names of those whose readers wait for `gate`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(ImageHandler, directory=str(folder)))
        self.gate, self.requested = threading.Event(), set[str]()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class ImageHandler(SimpleHTTPRequestHandler):
    server: HeldImages

    def do_GET(self) -> None:
        self.server.requested.add(self.path.strip("/"))
        self.server.gate.wait()
        with contextlib.suppress(ConnectionError):  # its reader was killed
            super().do_GET()

    def log_message(self, *_: object) -> None:
        return


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
    held = HeldImages(photos)
    threading.Thread(target=held.serve_forever, daemon=True).start()
    names = tmp_path / "names.txt"
    images = [
        held.url(path.name) if path.name in HELD else str(path) for path in sorted(photos.glob("*.jpg"))
    ]
    names.write_text("\n".join(images))
    held.gate.set()
    classify(bundle_path, [str(names)], tmp_path / "here", SETTINGS, OPTIONS)
    held.gate.clear()
    held.requested.clear()

    def kill_a_node(cluster: Any, node: Any) -> None:
        until(lambda: held.requested == set(HELD), 4 * START_SECONDS)
        raylet = node.all_processes["raylet"][0].process.pid
        for process in (raylet, *below(raylet)):  # a machine ends with all of its processes
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        cluster.remove_node(node, allow_graceful=False)
        held.gate.set()

    with two_nodes() as nodes:
        killer = threading.Thread(target=kill_a_node, args=nodes)
        killer.start()
        cluster = RayOptions(ray="auto", actors=2)
        found = classify(bundle_path, [str(names)], tmp_path / "out", cluster=cluster)
        killer.join(START_SECONDS)
        assert not killer.is_alive()
    assert (found.images, found.classified) == (100, 100)
    held.shutdown()
    held.server_close()
    assert part_bytes(tmp_path / "out") == part_bytes(tmp_path / "here")
