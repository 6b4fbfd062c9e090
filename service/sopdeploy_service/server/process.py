"""`sopdeploy serve`: run one server process from verified startup to graceful shutdown."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sopdeploy.base.environment import usable_cores
from sopdeploy.bundle.folder import Bundle, read_files
from sopdeploy.bundle.manifest import Manifest
from sopdeploy_service.inference import daemon_threads
from sopdeploy_service.inference.bundle_store import find_bundles, links_among
from sopdeploy_service.inference.load_time import wait_in_time
from sopdeploy_service.inference.loader import load_bundle
from sopdeploy_service.observability import logs
from sopdeploy_service.runtime.choice import may_use_gpu
from sopdeploy_service.runtime.device_memory import limit_heaps
from sopdeploy_service.server.lifetime import room_required
from sopdeploy_service.server.sockets import bind, raise_file_limit
from sopdeploy_service.settings import Settings

if TYPE_CHECKING:  # a supervisor does not import it
    from sopdeploy_service.inference.model_registry import ModelRegistry

MIN_FRONT_ENDS = 2
# An image takes 1.5 ms of a front end and 2.3 ms of its decoders (docs/benchmarks/serving.md): with more
# decoders, they wait for it.
CORES_PER_FRONT_END = 2


def run_server(sources: Sequence[str | Path], settings: Settings) -> int:
    """Serve the bundles at *sources* until SIGTERM or SIGINT.

    A source is a bundle, a directory of bundles, or `NAME=BUNDLE`. Prints `ready: URL
    BUNDLE ...` and the addresses of its pages when the probes are verified and the port is open.
    Returns the exit code: 0 after a drain, 70 if a runtime died. Raises `ConfigError` if it cannot listen, and the
    errors of `find_links`, `find_bundles`, `load_bundle` and `create_app`. With several
    processes, returns and raises what `run_supervisor` does.
    """
    if threading.current_thread() is threading.main_thread():
        # By default, these signals would end a server that is not ready yet.
        for number in (signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)

    # Read before the bundles: a link that moves while they are loaded then counts as moved.
    # With several devices, this only checks that there are links; each process reads them on
    # its own.
    links = find_links(sources, settings)

    # Several processes: the supervisor serves.
    front_ends = choose_front_ends(settings)
    if settings.devices or front_ends:
        from sopdeploy_service.devices.supervisor import run_supervisor  # noqa: PLC0415

        return run_supervisor(sources, settings.model_copy(update={"front_ends": front_ends}))

    # One process.
    with bind(settings.host, settings.port) as listener, configured_process(settings):
        registry = load_registry(sources, settings)
        from sopdeploy_service.app import create_app  # noqa: PLC0415
        from sopdeploy_service.server.draining_server import DrainingServer  # noqa: PLC0415

        app = create_app(registry, settings)
        return DrainingServer(app, settings, sources, links).serve_until_end(listener)


@contextmanager
def configured_process(settings: Settings) -> Iterator[None]:
    """Configure memory, open files and log before threads start.

    Raises `RuntimeUnavailableError` if the system has no room for what runs in the block.
    """
    limit_heaps()
    raise_file_limit(settings.max_connections)
    with room_required(), logs.configured(settings):
        yield


def choose_front_ends(settings: Settings) -> int:
    """Return the number of front ends; 0: each device serves HTTP itself, as it should on a CPU."""
    if settings.front_ends != "auto":
        return settings.front_ends
    if "cpu" in settings.devices or not may_use_gpu(settings):
        return 0
    return max(MIN_FRONT_ENDS, usable_cores() // CORES_PER_FRONT_END)


def find_links(sources: Sequence[str | Path], settings: Settings) -> dict[Path, Path]:
    """Return where the links to follow lead now.

    Raises `ConfigError` if there are none, and `RuntimeUnavailableError` if the disk hangs.
    """
    if not settings.follow:
        return {}
    return wait_in_time(
        daemon_threads.start(partial(links_among, sources)), "the links", settings
    )


def load_registry(
    sources: Sequence[str | Path],
    settings: Settings,
    on_progress: Callable[[], object] = lambda: None,
) -> "ModelRegistry":
    """Load the bundles at *sources* in the time that *settings* allow; *on_progress* is called before each."""

    def read(_name: str, path: Path, manifest: Manifest) -> Bundle:
        return read_files(path, manifest)

    # This begins before the slow imports.
    finding = daemon_threads.start(partial(find_bundles, sources, read))

    bundles = wait_in_time(finding, "the bundles", settings)
    from sopdeploy_service.inference.model_registry import ModelRegistry  # noqa: PLC0415

    loaded = {}
    for name in list(bundles):
        on_progress()
        loaded[name] = load_bundle(bundles.pop(name), settings)
    return ModelRegistry(loaded, settings)
