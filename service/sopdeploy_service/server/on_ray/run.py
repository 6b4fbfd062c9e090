"""`sopdeploy ray`: run the application on the Ray of this machine until a signal arrives."""

import importlib
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sopdeploy.environment import install_hint, prepare_ray
from sopdeploy.errors import ConfigError
from sopdeploy_service.server.on_ray.plan import NAME, build_config
from sopdeploy_service.server.on_ray.scale import ScaleOptions
from sopdeploy_service.settings import Settings

CONNECT_SECONDS = 5.0
OUR_ERROR = re.compile(r"sopdeploy\.errors\.\w+: (.+)")  # in the traceback of a replica


def run(bundles: Mapping[str, Path], settings: Settings, scale: ScaleOptions) -> int:
    """Serve *bundles* until SIGTERM or SIGINT, then drain and return 0.

    Joins the Ray cluster of this machine or of RAY_ADDRESS without a change of its other applications. If
    there is none, starts a cluster and stops it in the end. Prints `ready: URL  BUNDLE ...` when all replicas
    are ready. Raises `ConfigError` if Ray is not installed, already runs this application or listens on
    another address, or if a replica does not start, and the errors of `build_config`.
    """
    config = build_config(bundles, settings, scale)
    prepare_ray(starts="RAY_ADDRESS" not in os.environ)  # only the HTTP port is for other machines
    try:
        ray, serve = importlib.import_module("ray"), importlib.import_module("ray.serve")
    except ImportError as problem:
        how = install_hint("Ray Serve", "sopdeploy[ray]")
        raise ConfigError(f"{how}, or write a config file with --emit") from problem
    ray.init(namespace="serve")
    try:
        serve.start(proxy_location=config["proxy_location"], http_options=config["http_options"])
        if NAME in serve.status().applications:
            raise ConfigError(
                f"{NAME} already runs on this Ray cluster; change it with --emit FILE and `serve deploy FILE`"
            )
        try:
            deploy(serve, config["applications"][0])
            check_reachable(settings.host, settings.port)
            names = " ".join(path.resolve().name for path in bundles.values())
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            sys.stdout.write(f"ready: http://{host}:{settings.port}  {names}\n")
            sys.stdout.flush()
            stopped = threading.Event()
            for number in (signal.SIGTERM, signal.SIGINT):  # Ray's own SIGTERM handler would not drain
                signal.signal(number, lambda *_: stopped.set())
            while not stopped.wait(1.0):
                pass
        finally:
            serve.delete(NAME)
    finally:
        ray.shutdown()
    return 0


def check_reachable(host: str, port: int) -> None:
    """Raise `ConfigError` if nothing listens at *host* and *port*: a joined Ray keeps its own address."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as problem:
        raise ConfigError(
            f"{host}:{port}: nothing listens here; use the --host and --port of the running Ray proxies"
        ) from problem


def deploy(serve: Any, application: Mapping[str, Any]) -> None:
    """Deploy *application* of a config and wait for its replicas; raises `ConfigError` if one fails."""
    module = importlib.import_module("sopdeploy_service.server.on_ray.application")
    (options,) = application["deployments"]
    try:
        app = module.application(module.OnRay, application["args"]["settings"], **options)
        serve.run(app, name=application["name"], route_prefix=application["route_prefix"])
    except RuntimeError as problem:
        errors = OUR_ERROR.findall(str(problem))
        raise ConfigError(errors[-1] if errors else f"Ray could not start it: {problem}") from problem
