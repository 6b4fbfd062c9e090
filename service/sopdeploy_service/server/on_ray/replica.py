"""One replica: the app of `serve` in a process that Ray started, feeds with requests and watches.

The bundles come by `reconfigure`, so that others can take their place while requests are answered. When an
engine dies or hangs, the process ends: Ray starts another one. A replica that refused everything at once
would look idle to Ray's router, and get ever more requests.
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
from sopdeploy_service.inference.fault_injection import faults_from_environment
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.service import Service
from sopdeploy_service.observability import logs
from sopdeploy_service.observability.request_context import open_tracing
from sopdeploy_service.server.health_port import BEAT_SECONDS, LoopWatch
from sopdeploy_service.server.memory import Rest, give_back_in_a_thread
from sopdeploy_service.server.on_ray.plan import UserConfig, check
from sopdeploy_service.server.process import CLOSING_SECONDS, ENGINE_DEAD_EXIT, prepare_process
from sopdeploy_service.settings import load_settings

LAST_ANSWERS_SECONDS = 0.2  # an answer that is complete is still on its way to Ray's proxy

log = logging.getLogger("sopdeploy.server")


class Replica:
    """What Ray calls; all methods but the first on the event loop that answers requests."""

    leave: Callable[[int], None] = staticmethod(os._exit)  # a hung engine would hold up any other end
    _watching: asyncio.Task[None] | None = None

    def __init__(
        self, settings: Mapping[str, Any], inferences: Mapping[str, LoadedModel] | None = None
    ) -> None:
        """Make the app, with *inferences* by name before the first `reconfigure`; raises `ConfigError`."""
        self._stack = ExitStack()
        self.settings = load_settings(**settings)
        check(self.settings)
        prepare_process()
        self._stack.enter_context(logs.configured(self.settings))
        open_trace = self._stack.enter_context(open_tracing(self.settings))
        self.asgi: FastAPI = create_app(
            inferences or {}, self.settings, faults=faults_from_environment(), open_trace=open_trace
        )
        self.service: Service = self.asgi.state.service
        self._watch = LoopWatch()
        self.service.metrics.loop_lag(self._watch.worst)

    async def reconfigure(self, user_config: Any) -> None:
        """Answer with the bundles of *user_config*, `{"bundles": {NAME: PATH}}`, and with no others.

        They take over when all are open and verified. Raises `ConfigError`, and what `open_verified` does;
        then the bundles before go on answering.
        """
        try:
            wanted = UserConfig.model_validate(user_config)
        except pydantic.ValidationError as problem:
            raise ConfigError(f"user_config: {first_problem(problem)}") from problem
        await self.service.registry.follow(wanted.bundles, partial(load_model, settings=self.settings))

    async def check_health(self) -> None:
        """Raise unless images are answered here."""
        state = self.service.state
        if state == "no_model":
            raise ConfigError("no bundle to answer with: name one in user_config, bundles: {NAME: PATH}")
        if state != "ok":
            raise RuntimeUnavailableError(f"this replica answers no more ({state})")

    def watch(self) -> None:
        """Begin to measure how late the loop is, and to end the process when an engine is dead."""
        self._watching = asyncio.get_running_loop().create_task(self._end_with_the_engine())

    def close(self) -> None:
        """Send what is left of log and traces; the app has ended."""
        if self._watching is not None:
            self._watching.cancel()
        self._stack.close()

    async def _end_with_the_engine(self) -> None:
        rest = Rest(give_back_in_a_thread)
        while self.service.state != "engine_dead":
            await asyncio.sleep(BEAT_SECONDS)
            self._watch.beat()
            rest.tick(time.monotonic(), self.service.active_requests)
        log.critical("an engine is dead; this replica ends, Ray starts another")
        end = time.monotonic() + CLOSING_SECONDS
        while self.service.active_requests and time.monotonic() < end:
            await asyncio.sleep(BEAT_SECONDS)
        await asyncio.sleep(LAST_ANSWERS_SECONDS)
        self.leave(ENGINE_DEAD_EXIT)
