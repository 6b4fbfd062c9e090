"""Faults on order, so that people can rehearse what their alerts and retries do: `SOPDEPLOY_FAULTS`.

    SOPDEPLOY_FAULTS=engine=hang@5,engine=nan@3,engine=raise@2,engine=slow*10,engine=oom@4,decoder=die@2

`@n` is the n-th run of an engine (its batches and their halves are counted from the first request on), or the
n-th picture of a decoder; each happens once. `slow*n` lets every run take n times as long. Each model counts
its runs for itself, one that is loaded later too.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from sopdeploy.errors import ConfigError
from sopdeploy_service.runtime.base import OutOfMemoryError, Runtime
from sopdeploy_service.settings import FAULTS_VARIABLE

Value = TypeVar("Value")

log = logging.getLogger("sopdeploy.server")

ENTRY = re.compile(r"(engine=hang|engine=nan|engine=raise|engine=oom|decoder=die)@([1-9][0-9]{0,8})")
SLOW = re.compile(r"engine=slow\*([1-9][0-9]{0,5})")
HANG_SECONDS = 86_400.0
EXAMPLE = "engine=hang@5, engine=nan@3, engine=raise@2, engine=oom@4, engine=slow*10, decoder=die@2"


class OrderedError(Exception):
    """A failure that was asked for."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong: by the number of an engine's run, by the number of a decoder's picture, and always."""

    engine: Mapping[int, str] = field(default_factory=dict)
    decoder: frozenset[int] = frozenset()
    slow: int = 1

    def over(self, runtime: Runtime) -> Runtime:
        """Return *runtime* with these faults; itself where it has none."""
        return FaultyRuntime(runtime, self) if self.engine or self.slow > 1 else runtime

    def over_decoder(self, decode: Callable[..., Value]) -> Callable[..., Value]:
        """Return *decode* with these faults; itself where it has none."""
        return FaultyDecoder(decode, self.decoder) if self.decoder else decode


NO_FAULTS = Faults()


def parse_faults(text: str) -> Faults:
    """Return the faults in *text*, entries with commas between; raises `ConfigError` where one is none."""
    engine: dict[int, str] = {}
    decoder: set[int] = set()
    slow = 1
    for entry in filter(None, (part.strip() for part in text.split(","))):
        once, always = ENTRY.fullmatch(entry), SLOW.fullmatch(entry)
        if once is not None:
            where, _, what = once[1].partition("=")
            number = int(once[2])
            if where == "engine":
                engine[number] = what
            else:
                decoder.add(number)
        elif always is not None:
            slow = int(always[1])
        else:
            raise ConfigError(f"{FAULTS_VARIABLE}: {entry[:80]!r} is no fault; there are: {EXAMPLE}")
    return Faults(engine=engine, decoder=frozenset(decoder), slow=slow)


def faults_from_environment() -> Faults:
    """Return the faults that the environment orders, and warn of them; raises `ConfigError`."""
    text = os.environ.get(FAULTS_VARIABLE, "")
    faults = parse_faults(text)
    if text:
        log.warning("%s is set: this server will fail on purpose", FAULTS_VARIABLE, extra={"faults": text})
    return faults


class FaultyRuntime:
    """A runtime that answers as the one behind it, but for its faults."""

    def __init__(self, runtime: Runtime, faults: Faults) -> None:
        self.name = runtime.name
        self.device = runtime.device
        self.largest_batch = runtime.largest_batch
        self._runtime = runtime
        self._faults = faults
        self._runs = 0

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Run *images*, or fail as ordered: `nan` hits the first image of its batch."""
        self._runs += 1
        fault = self._faults.engine.get(self._runs)
        if fault == "hang":
            time.sleep(HANG_SECONDS)
        if fault == "raise":
            raise OrderedError(f"{FAULTS_VARIABLE}: engine=raise@{self._runs}")
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


class FaultyDecoder(Generic[Value]):
    """A decoder that dies of some pictures; called by several threads."""

    def __init__(self, decode: Callable[..., Value], deadly: frozenset[int]) -> None:
        self._decode = decode
        self._deadly = deadly
        self._pictures = 0
        self._lock = threading.Lock()

    def __call__(self, *values: object, **options: object) -> Value:
        """Decode one picture, or die of it."""
        with self._lock:
            self._pictures += 1
            number = self._pictures
        if number in self._deadly:
            raise OrderedError(f"{FAULTS_VARIABLE}: decoder=die@{number}")
        return self._decode(*values, **options)
