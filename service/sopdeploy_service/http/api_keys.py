"""API keys: who may ask this server, for what and how often.

A key is 256 random bits, so its plain SHA-256 is all that a file needs to hold: there is nothing to guess
that a slow hash would protect. `sopdeploy key` makes keys and shows each of them once.
"""

import hashlib
import hmac
import os
import secrets
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import pydantic

from sopdeploy.config import StrictModel, first_problem
from sopdeploy.errors import ConfigError

PREFIX = "sop_"  # so that a scanner for leaked secrets can know one
BITS = 256

Scope: TypeAlias = Literal["classify", "admin"]
KeyName = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class Key(StrictModel):
    """One key, without the key itself; *rate* is in images per second, None is no limit."""

    name: KeyName
    sha256: Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]
    rate: Annotated[float, pydantic.Field(gt=0, le=1e6)] | None = None
    burst: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 32
    scopes: tuple[Scope, ...] = ("classify",)


class KeyFile(StrictModel):
    """A file of keys: one `[[key]]` table for each."""

    key: tuple[Key, ...] = ()


class ApiKeys:
    """The keys of one server."""

    def __init__(self, keys: tuple[Key, ...]) -> None:
        self.keys = keys
        self._digests = [(bytes.fromhex(key.sha256), key) for key in keys]

    def find(self, given: bytes) -> Key | None:
        """Return the key that *given* is; every key is compared, whatever the answer, in constant time."""
        digest = hashlib.sha256(given).digest()
        found = None
        for known, key in self._digests:
            if hmac.compare_digest(digest, known):
                found = key
        return found


def read_keys(path: Path) -> tuple[Key, ...]:
    """Return the keys in the file at *path*.

    Raises `ConfigError` where there is no such file, it is not one of keys, or two have one name or value.
    """
    try:
        found = KeyFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as problem:
        raise ConfigError(
            f"{path}: no keys here ({problem.strerror}); `sopdeploy key` makes one"
        ) from problem
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path}: not TOML ({problem})") from problem
    except pydantic.ValidationError as problem:
        raise ConfigError(f"{path}: {first_problem(problem)}") from problem
    for what in ("name", "sha256"):
        values = [getattr(key, what) for key in found.key]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ConfigError(f"{path}: two keys have the {what} {twice}; remove one")
    return found.key


def open_ring(path: Path) -> ApiKeys:
    """Return the keys at *path* for a server; raises `ConfigError` also where there are none."""
    keys = read_keys(path)
    if not keys:
        raise ConfigError(f"{path}: holds no key, nobody could ask; `sopdeploy key` makes one")
    return ApiKeys(keys)


def new_key(path: Path, name: str, *, rate: float | None, burst: int | None, admin: bool) -> str:
    """Return a new key called *name* and write its hash to the file at *path*, in one step, mode 0600.

    Raises `ConfigError` where the name is taken or wrong, or the file cannot be written.
    """
    key = PREFIX + secrets.token_urlsafe(BITS // 8)
    known = read_keys(path) if path.exists() else ()
    if any(other.name == name for other in known):
        raise ConfigError(f"{path}: has a key {name}; choose another name, or remove its lines first")
    wanted = {
        "name": name,
        "sha256": hashlib.sha256(key.encode()).hexdigest(),
        "rate": rate,
        "scopes": ("classify", "admin") if admin else ("classify",),
    }
    try:
        entry = Key.model_validate(wanted if burst is None else wanted | {"burst": burst})
    except pydantic.ValidationError as problem:
        raise ConfigError(f"key: {first_problem(problem)}") from problem
    write_private(path, (path.read_text(encoding="utf-8") if path.exists() else "") + as_toml(entry))
    return key


def as_toml(key: Key) -> str:
    """Return *key* as its table in a file; no value in it needs escaping."""
    rate = "# no rate: no limit" if key.rate is None else f"rate = {key.rate!r}\nburst = {key.burst}"
    scopes = ", ".join(f'"{scope}"' for scope in key.scopes)
    return f'\n[[key]]\nname = "{key.name}"\nsha256 = "{key.sha256}"\n{rate}\nscopes = [{scopes}]\n'


def write_private(path: Path, text: str) -> None:
    """Let *path* hold *text* in one step, readable by its owner only; raises `ConfigError`."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be written ({problem.strerror})") from problem
