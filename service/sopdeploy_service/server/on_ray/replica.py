"""One Ray Serve replica: the app of `serve` in a process that Ray starts, routes to and monitors.

`reconfigure` swaps bundles without dropping requests. When a runtime dies or hangs, the process exits and Ray
starts another one: a replica that rejected every request at once would look idle to Ray's router.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import pydantic
from fastapi import FastAPI

from sopdeploy.config import first_problem
from sopdeploy.errors import ConfigError, RuntimeUnavailableError
from sopdeploy_service.app import create_app
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.service import Service
from sopdeploy_service.server.draining_server import CLOSING_SECONDS, IdleTrigger, freeze_objects
from sopdeploy_service.server.launch import BEAT_SECONDS, EXIT_RUNTIME_DEAD, LoopWatch
from sopdeploy_service.server.on_ray.plan import UserConfig, check_settings
from sopdeploy_service.server.process import configured_process
from sopdeploy_service.settings import load_settings

LAST_RESPONSES_SECONDS = 0.2  # for complete responses on their way to Ray's proxy

log = logging.getLogger("sopdeploy.server")


class Replica:
    """The interface that Ray calls; all methods but `__init__` run on the event loop of the app."""

    leave: Callable[[int], None] = staticmethod(os._exit)  # a hanging runtime would block a regular exit
    _watching: asyncio.Task[None] | None = None

    def __init__(self, settings: Mapping[str, Any], models: Mapping[str, LoadedModel] | None = None) -> None:
        """Create the app, which serves *models* by name until the first `reconfigure`.

        Raises `ConfigError` for *settings* that are invalid or need a single process.
        """
        self._stack = ExitStack()
        self.settings = load_settings(**settings)
        check_settings(self.settings)
        open_trace = self._stack.enter_context(configured_process(self.settings))
        freeze_objects()
        self.asgi: FastAPI = create_app(models or {}, self.settings, open_trace=open_trace)
        self.service: Service = self.asgi.state.service
        self._watch = LoopWatch()
        self.service.metrics.loop_lag.set_function(self._watch.worst)

    async def reconfigure(self, user_config: Any) -> None:
        """Serve exactly the bundles of *user_config*, `{"bundles": {NAME: PATH}}`.

        The swap happens when all of them are loaded and verified. Raises `ConfigError` and what `load_model`
        raises; the previous bundles then stay in use.
        """
        try:
            wanted = UserConfig.model_validate(user_config)
        except pydantic.ValidationError as problem:
            raise ConfigError(f"user_config: {first_problem(problem)}") from problem
        await self.service.registry.follow(wanted.bundles, partial(load_model, settings=self.settings))

    async def check_health(self) -> None:
        """Raise an error unless the service can classify images."""
        state = self.service.state
        if state == "no_model":
            raise ConfigError("no bundle is loaded; name one in user_config, bundles: {NAME: PATH}")
        if state != "ok":
            raise RuntimeUnavailableError(f"this replica does not serve ({state})")

    def watch(self) -> None:
        """Start to measure the loop lag, and exit the process when a runtime is dead."""
        self._watching = asyncio.get_running_loop().create_task(self._exit_with_runtime())

    def close(self) -> None:
        """Flush logs and traces after the shutdown of the app."""
        if self._watching is not None:
            self._watching.cancel()
        self._stack.close()

    async def _exit_with_runtime(self) -> None:
        idle = IdleTrigger()
        while self.service.state != "runtime_dead":
            await asyncio.sleep(BEAT_SECONDS)
            self._watch.beat()
            idle.tick(time.monotonic(), self.service.active_requests)
        log.critical("a runtime is dead; this replica exits and Ray starts another one")
        end = time.monotonic() + CLOSING_SECONDS
        while self.service.active_requests and time.monotonic() < end:
            await asyncio.sleep(BEAT_SECONDS)
        await asyncio.sleep(LAST_RESPONSES_SECONDS)
        self.leave(EXIT_RUNTIME_DEAD)
