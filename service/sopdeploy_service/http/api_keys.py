"""API keys: a file with names, hashes and rate limits; a token bucket per key.

A key has 256 random bits, so the file stores its plain SHA-256: a slow hash protects only
secrets that can be guessed. `sopdeploy key` creates keys and prints each one once. A server
reads the file at its start and at every reload (`read_again`).
"""

import hashlib
import hmac
import logging
import math
import os
import secrets
import time
from collections import Counter
from collections.abc import MutableSequence, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, TypeAlias

import pydantic
from prometheus_client import Gauge

from sopdeploy.base.config import StrictModel, first_problem, matching, parse_toml
from sopdeploy.base.file_systems import locked_folder, set_mode, set_owner
from sopdeploy.base.files import atomic_write, read_text, writing
from sopdeploy.errors import ConfigError, SopdeployError
from sopdeploy_service.inference import daemon_threads
from sopdeploy_service.inference.load_time import finish_in_time
from sopdeploy_service.inference.results import HttpError, RejectedError
from sopdeploy_service.settings import Settings

_PREFIX = "sop_"  # lets secret scanners recognize leaked keys
BITS = 256
_ROUNDING = 1e-6  # tokens that may be missing after the announced time

# The tokens, and the time of the last fill, 0 before the first one. Processes may share this
# memory, without a lock: if two of them change it at once, a few requests more may pass.
BucketState: TypeAlias = "MutableSequence[float] | memoryview[float]"
_TOKENS = 0
_FILLED = 1
STATE_BYTES = 16  # of a key
RATE_HEADERS = "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset"
KeyName = Annotated[
    str,
    matching(r"[A-Za-z0-9._-]{1,64}", "a name of 1 to 64 letters, digits, dots, `_` and `-`"),
]

log = logging.getLogger("sopdeploy.http")


class Key(StrictModel):
    """One key, without the secret; *rate* is in images per second, None means unlimited."""

    name: KeyName
    sha256: Annotated[str, matching(r"[0-9a-f]{64}", "a SHA-256 of 64 hexadecimal digits")]
    rate: Annotated[float, pydantic.Field(gt=0, le=1e6)] | None = None
    burst: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 64


class KeyFile(StrictModel):
    """A key file: one `[[key]]` table per key."""

    key: tuple[Key, ...] = ()


def find_key(keys: Sequence[Key], secret: bytes) -> Key | None:
    """Find the key with *secret* in constant time: all of *keys* are compared, even after a match."""
    digest = hashlib.sha256(secret).hexdigest()
    matches = [key for key in keys if hmac.compare_digest(digest, key.sha256)]
    return matches[0] if matches else None


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read the key file *path*.

    Raises `ConfigError` if it is missing or malformed, or if two keys share a name or a hash.
    """
    # Read the file; the errors tell what to do.
    try:
        keys = KeyFile.model_validate(parse_toml(read_text(path))).key
    except OSError as problem:
        hint = "`sopdeploy key` creates a key file"
        if isinstance(problem, PermissionError):
            hint = f"the server runs as user {os.geteuid()}: run chown {os.geteuid()} {path}"
        raise ConfigError(f"{path}: cannot read keys ({problem.strerror}); {hint}") from problem
    except pydantic.ValidationError as problem:
        raise ConfigError(f"{path}: {first_problem(problem)}") from problem
    except ValueError as problem:
        raise ConfigError(f"{path}: {problem}; correct the file") from problem

    # No two keys may share a name or a secret.
    for attribute in ("name", "sha256"):
        for value, count in Counter(getattr(key, attribute) for key in keys).items():
            if count > 1:
                raise ConfigError(f"{path}: two keys have the {attribute} {value}; remove one")

    return keys


def keys_of_server(path: Path) -> tuple[Key, ...]:
    """Read the keys that a server accepts from *path*; raises `ConfigError` also if there are none."""
    keys = read_keys(path)
    if not keys:
        reason = "has no key, so no request would be accepted; see `sopdeploy key`"
        raise ConfigError(f"{path}: {reason}")
    return keys


async def read_again(settings: Settings, unreadable: Gauge) -> tuple[Key, ...] | None:
    """Read the keys of a server again; if this is not possible, log why and return None.

    Sets the gauge *unreadable* to 1 if it is not possible, else to 0.
    """
    if settings.keys is None:
        return ()

    try:
        reading = daemon_threads.start(partial(keys_of_server, settings.keys))
        keys = await finish_in_time(reading, settings.keys, settings)
    except (SopdeployError, OSError) as error:
        unreadable.set(1)
        log.error("keys not reloaded, those in use stay: %s", error)
        return None

    unreadable.set(0)
    return keys


def file_identity(path: Path) -> tuple[int, int, int]:
    """Return what changes if the file at *path*, or who may read it, changes; (0, 0, 0) without a file."""
    try:
        facts = path.stat()
    except OSError:
        return 0, 0, 0
    return facts.st_ino, facts.st_ctime_ns, facts.st_size


def new_key(path: Path, name: str, rate: float | None = None) -> str:
    """Create a key called *name*, add its hash to the file at *path* (mode 0600) and return the secret.

    The write is atomic and waits for other processes that add a key; the owner of the file
    stays if this process is root. Raises `ConfigError` for an invalid or used name, an invalid
    rate or a malformed file, and `StorageError` if the file cannot be written.
    """
    with writing(path), locked_folder(path.parent):
        if path.exists() and any(key.name == name for key in read_keys(path)):
            raise ConfigError(
                f"{path}: key {name} exists; choose another name or remove its entry first"
            )

        # Make the secret; the file has only its hash.
        secret = _PREFIX + secrets.token_urlsafe(BITS // 8)
        fields = {
            "name": name,
            "sha256": hashlib.sha256(secret.encode()).hexdigest(),
            "rate": rate,
        }

        try:
            key = Key.model_validate(fields)
        except pydantic.ValidationError as problem:
            raise ConfigError(f"key: {first_problem(problem)}") from problem

        # Write the table of the key behind those that the file has.
        limit = (
            "# no rate: unlimited"
            if key.rate is None
            else f"rate = {key.rate!r}\nburst = {key.burst}"
        )
        table = f'\n[[key]]\nname = "{key.name}"\nsha256 = "{key.sha256}"\n{limit}\n'

        with atomic_write(path, durable=True) as partial:
            set_mode(partial, 0o600)
            if path.exists():
                table = read_text(path) + table
                set_owner(partial, path)
            partial.write_text(table, "utf-8")

        return secret


def _whole(tokens: float) -> int:
    """Return how many images *tokens* pay for: of the last one, `_ROUNDING` may be missing."""
    return math.floor(tokens + _ROUNDING)


class TokenBucket:
    """Holds up to *burst* tokens and gains *rate* per second; an image takes one. For one event loop."""

    def __init__(self, rate: float, burst: int, state: BucketState) -> None:
        self._rate = rate
        self.burst = burst
        self._state = state
        if not state[_FILLED]:
            state[_TOKENS], state[_FILLED] = float(burst), time.monotonic()

    def spend(self, num_images: int, *, check_only: bool = False, work: int = 0) -> None:
        """Take the tokens of *num_images*, unless *check_only*.

        Raises `RejectedError` for more images than the *burst*, and takes nothing. Raises it for
        more images than there are tokens now, and takes *work* tokens instead, those of what
        was done for the request.
        """
        tokens = self._fill()
        if num_images > self.burst:
            message = f"{num_images} images exceed the limit of this key ({self.burst}); send fewer per request"
            raise RejectedError(HttpError("too_many_images", 400, message))

        if num_images > _whole(tokens):
            num_left = self.charge(work)  # what was done for the refused request
            wait = math.ceil((num_images - num_left) / self._rate)
            message = f"this key may send {self._rate:g} images per second; retry later"
            raise RejectedError(HttpError("rate_limited", 429, message, wait))

        if not check_only:
            # Up to `_ROUNDING` tokens may be missing.
            self._state[_TOKENS] = max(0.0, tokens - num_images)

    def charge(self, num_tokens: int) -> float:
        """Take *num_tokens*; return how many are left.

        Tokens are also taken before they are there: down to minus *burst*.
        """
        num_left = max(-float(self.burst), self._fill() - num_tokens)
        self._state[_TOKENS] = num_left
        return num_left

    def headers(self) -> dict[str, str]:
        """Format the response headers; `Reset` is the time in seconds until the bucket is full."""
        tokens = self._fill()
        values = (
            self.burst,
            max(0, _whole(tokens)),
            math.ceil((self.burst - tokens) / self._rate),
        )
        return dict(zip(RATE_HEADERS, map(str, values), strict=True))

    def _fill(self) -> float:
        """Add the tokens gained since the last call; return how many there are now."""
        now = time.monotonic()
        burst = float(self.burst)
        tokens = self._state[_TOKENS]
        filled = self._state[_FILLED]

        tokens = min(burst, tokens + (now - filled) * self._rate)
        self._state[_TOKENS], self._state[_FILLED] = tokens, now
        return tokens


class KeyRing:
    """The keys that a server accepts and, for each, two numbers in *states* for its rate limit."""

    def __init__(self, keys: Sequence[Key], states: "BucketState | None" = None) -> None:
        """Accept *keys*; without *states*, their numbers are in memory of this process."""
        self.keys: Sequence[Key] = ()
        self._states: BucketState = []
        self.replace(keys, states)

    def replace(self, keys: Sequence[Key], states: "BucketState | None" = None) -> None:
        """Accept *keys* instead; without *states*, those of keys whose names stay are copied."""
        self._states = self.states_of(keys) if states is None else states
        self.keys = keys

        self._buckets = {
            key.name: TokenBucket(key.rate, key.burst, self._state_at(number))
            for number, key in enumerate(keys)
            if key.rate is not None
        }

    def states_of(self, keys: Sequence[Key]) -> "memoryview[float]":
        """Copy the states of *keys*; that of a new name is zero, a full bucket."""
        states = memoryview(bytearray(STATE_BYTES * len(keys))).cast("d")
        positions = {key.name: number for number, key in enumerate(self.keys)}

        for number, key in enumerate(keys):
            if key.name in positions:
                state = self._state_at(positions[key.name])
                states[2 * number], states[2 * number + 1] = state[_TOKENS], state[_FILLED]
        return states

    def find(self, secret: bytes) -> tuple[Key, TokenBucket | None] | None:
        """Return the key with *secret* and its rate limit; None without such a key."""
        key = find_key(self.keys, secret)
        return None if key is None else (key, self._buckets.get(key.name))

    def _state_at(self, number: int) -> BucketState:
        return self._states[2 * number : 2 * number + 2]
