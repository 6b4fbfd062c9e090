"""`sopdeploy ray`: the application on the Ray of this machine, until a signal comes."""

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

from sopdeploy.environment import install_hint
from sopdeploy.errors import ConfigError
from sopdeploy_service.server.on_ray.plan import NAME, Scale, config
from sopdeploy_service.settings import Settings

USAGE_VARIABLE = "RAY_USAGE_STATS_ENABLED"
CONNECT_SECONDS = 5.0
OUR_ERROR = re.compile(r"sopdeploy\.errors\.\w+: (.+)")  # in the traceback of a replica


def run(bundles: Mapping[str, Path], settings: Settings, scale: Scale) -> int:
    """Answer with *bundles* until SIGTERM or SIGINT, then drain; return 0.

    Joins the Ray that runs on this machine or that RAY_ADDRESS names, and leaves its other applications
    alone; where there is none, starts one and ends it. Prints `ready: URL  BUNDLE ...` when all answer.
    Raises `ConfigError` where Ray is not installed, has an application of ours already or listens elsewhere,
    or where a replica does not start; and what `config` does.
    """
    told = config(bundles, settings, scale)
    os.environ.setdefault(USAGE_VARIABLE, "0")  # Ray would tell its makers what it runs on
    try:
        ray, serve = importlib.import_module("ray"), importlib.import_module("ray.serve")
    except ImportError as problem:
        how = install_hint("Ray Serve", "sopdeploy[ray]")
        raise ConfigError(f"{how}, or write a config file with --emit") from problem
    ray.init(namespace="serve")
    try:
        serve.start(proxy_location=told["proxy_location"], http_options=told["http_options"])
        if NAME in serve.status().applications:
            raise ConfigError(
                f"{NAME} runs on this Ray already; change it with --emit FILE and `serve deploy FILE`"
            )
        try:
            deploy(serve, told["applications"][0])
            reach(settings.host, settings.port)
            names = " ".join(path.resolve().name for path in bundles.values())
            sys.stdout.write(f"ready: http://{settings.host}:{settings.port}  {names}\n")
            sys.stdout.flush()
            wait_for_a_signal()
        finally:
            serve.delete(NAME)
    finally:
        ray.shutdown()
    return 0


def reach(host: str, port: int) -> None:
    """Raise `ConfigError` where nobody listens: a Ray that is joined keeps the address it has."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as problem:
        raise ConfigError(
            f"{host}:{port}: nobody listens here; Ray's proxies were started with another --host or --port"
        ) from problem


def wait_for_a_signal() -> None:
    """Wait for SIGTERM or SIGINT; Ray's own handler of the first would not let the replicas drain."""
    told = threading.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, lambda *_: told.set())
    while not told.wait(1.0):
        pass


def deploy(serve: Any, told: Mapping[str, Any]) -> None:
    """Start the application *told*, wait for its replicas; raises `ConfigError` where one does not start."""
    made = importlib.import_module("sopdeploy_service.server.on_ray.application")
    (options,) = told["deployments"]
    try:
        app = made.application(made.OnRay, told["args"]["settings"], **options)
        serve.run(app, name=told["name"], route_prefix=told["route_prefix"])
    except RuntimeError as problem:
        found = OUR_ERROR.findall(str(problem))
        raise ConfigError(found[-1] if found else f"Ray could not start it: {problem}") from problem
