"""Inject faults to test alerts and client retries: `SOPDEPLOY_FAULTS`.

    SOPDEPLOY_FAULTS=engine=hang@5,engine=nan@3,engine=raise@2,engine=slow*10,engine=oom@4,decoder=die@2

`@n` is the n-th run of a model (its batches and their halves, counted from the first request) or the n-th
image of the decoders; each fault happens once. `slow*n` makes every run take n times as long. Each model
counts its own runs, also one that is loaded later.
"""

import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sopdeploy.environment import FAULTS_VARIABLE
from sopdeploy.errors import ConfigError
from sopdeploy_service.runtime.base import OutOfMemoryError, Runtime

ENTRY = re.compile(r"(engine=hang|engine=nan|engine=raise|engine=oom|decoder=die)@([1-9][0-9]{0,8})")
SLOW = re.compile(r"engine=slow\*([1-9][0-9]{0,5})")
EXAMPLE = "engine=hang@5, engine=nan@3, engine=raise@2, engine=oom@4, engine=slow*10, decoder=die@2"
HANG_SECONDS = 86_400.0

Value = TypeVar("Value")

log = logging.getLogger("sopdeploy.server")


class InjectedError(Exception):
    """A failure requested by `SOPDEPLOY_FAULTS`."""


@dataclass(frozen=True, slots=True)
class Faults:
    """The requested faults.

    `engine` maps numbers of runs to faults, `decoder` has the numbers of the images whose decoding fails, and
    every run takes `slow` times as long.
    """

    engine: Mapping[int, str] = field(default_factory=dict)
    decoder: frozenset[int] = frozenset()
    slow: int = 1

    def wrap_runtime(self, runtime: Runtime) -> Runtime:
        """Add the faults to *runtime*; return it unchanged if there are none for it."""
        return FaultyRuntime(runtime, self) if self.engine or self.slow > 1 else runtime

    def wrap_decoder(self, decode: Callable[..., Value]) -> Callable[..., Value]:
        """Add the faults to *decode*; return it unchanged if there are none for it. Thread-safe."""
        if not self.decoder:
            return decode
        numbers = itertools.count(1)

        def faulty_decode(*values: object, **options: object) -> Value:
            number = next(numbers)
            if number in self.decoder:
                raise InjectedError(f"{FAULTS_VARIABLE}: decoder=die@{number}")
            return decode(*values, **options)

        return faulty_decode


NO_FAULTS = Faults()


def parse_faults(text: str) -> Faults:
    """Parse comma-separated faults; raise `ConfigError` for an entry that is not one."""
    engine: dict[int, str] = {}
    decoder: set[int] = set()
    slow = 1
    for entry in filter(None, (part.strip() for part in text.split(","))):
        once, always = ENTRY.fullmatch(entry), SLOW.fullmatch(entry)
        if once is not None and once[1] == "decoder=die":
            decoder.add(int(once[2]))
        elif once is not None:
            engine[int(once[2])] = once[1].removeprefix("engine=")
        elif always is not None:
            slow = int(always[1])
        else:
            raise ConfigError(f"{FAULTS_VARIABLE}: {entry[:80]!r} is not a fault; use one of: {EXAMPLE}")
    return Faults(engine=engine, decoder=frozenset(decoder), slow=slow)


def faults_from_environment() -> Faults:
    """Parse `SOPDEPLOY_FAULTS`, with a warning if it is set."""
    text = os.environ.get(FAULTS_VARIABLE, "")
    faults = parse_faults(text)
    if text:
        log.warning("%s is set: this server will fail on purpose", FAULTS_VARIABLE, extra={"faults": text})
    return faults


class FaultyRuntime:
    """Runs *runtime* with *faults*."""

    def __init__(self, runtime: Runtime, faults: Faults) -> None:
        self.name = runtime.name
        self.device = runtime.device
        self.largest_batch = runtime.largest_batch
        self._runtime = runtime
        self._faults = faults
        self._runs = 0
        self.close = runtime.close

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Run *images* or fail; the fault `nan` changes the outputs of the first image."""
        self._runs += 1
        fault = self._faults.engine.get(self._runs)
        if fault == "hang":
            time.sleep(HANG_SECONDS)
        if fault == "raise":
            raise InjectedError(f"{FAULTS_VARIABLE}: engine=raise@{self._runs}")
        if fault == "oom":
            raise OutOfMemoryError(f"{FAULTS_VARIABLE}: engine=oom@{self._runs}")
        started = time.monotonic()
        outputs = self._runtime.run(images)
        time.sleep((self._faults.slow - 1) * (time.monotonic() - started))
        if fault == "nan":
            outputs = {name: values.copy() for name, values in outputs.items()}
            for values in outputs.values():
                values[0] = np.nan
        return outputs
