"""Server settings from command-line flags, `SOPDEPLOY_*` environment variables and a TOML file.

Flags override the environment (`SOPDEPLOY_PORT=9000`), the environment overrides the file
(`port = 9000`), and the file overrides the defaults. The file is the one passed explicitly or
the one named by `SOPDEPLOY_CONFIG`. The port that nothing else sets is the one of the variable
`PORT`, if there is one.
"""

import json
import os
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from sopdeploy.base.config import (
    Count,
    Fraction,
    StrictModel,
    first_problem,
    matching,
    parse_toml,
    shown,
)
from sopdeploy.base.environment import usable_cores
from sopdeploy.base.files import read_text
from sopdeploy.base.nearest import did_you_mean
from sopdeploy.base.plugins import RUNTIMES, VARIABLE
from sopdeploy.errors import ConfigError
from sopdeploy.images.limits import MAX_BYTES, MAX_PIXELS
from sopdeploy_service.former_settings import FORMER_SETTINGS
from sopdeploy_service.origins import Network, parse_host, parse_network


def _split_commas(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _check_hosts(value: tuple[str, ...]) -> tuple[str, ...]:
    for text in value:
        parse_host(text)  # raises ValueError
    return value


def _check_origins(value: tuple[str, ...]) -> tuple[str, ...]:
    _check_hosts(tuple(text for text in value if text != "*"))
    return value


def _parse_networks(value: Any) -> Any:
    texts = _split_commas(value)

    return (
        tuple(parse_network(str(text)) for text in texts)
        if isinstance(texts, (tuple, list))
        else texts
    )


def _check_runtime(value: str) -> str:
    if value != "auto" and RUNTIMES.find(value) is None:
        known = ", ".join(["auto", *RUNTIMES.own(), *RUNTIMES.registered])
        raise ValueError(f"{RUNTIMES.suggest(value)} choose from {known}".lstrip())
    return value


RuntimeName = Annotated[str, pydantic.AfterValidator(_check_runtime)]
Delay = Annotated[float, pydantic.Field(ge=0, le=10_000)]
Port = Annotated[int, pydantic.Field(ge=0, le=65_535)]
Sandbox = Literal["auto", "off", "required"]
LogForm = Literal["json", "console"]
FrontEnds = Annotated[int, pydantic.Field(ge=0, le=256)]
Threads = Annotated[int, pydantic.Field(ge=1, le=4096)]
Seconds = Annotated[float, pydantic.Field(gt=0, le=86_400)]
Device = Annotated[
    str,
    matching(
        r"cpu|[0-9]{1,3}|(GPU|MIG)-[0-9A-Za-z/-]{4,80}",
        "a device: cpu, a number, or an id GPU-... or MIG-...",
    ),
]
PositiveBytes = Annotated[pydantic.ByteSize, pydantic.Field(gt=0)]
Devices = Annotated[tuple[Device, ...], pydantic.BeforeValidator(_split_commas)]
Hosts = Annotated[
    tuple[str, ...],
    pydantic.BeforeValidator(_split_commas),
    pydantic.AfterValidator(_check_hosts),
]
Origins = Annotated[
    tuple[str, ...],
    pydantic.BeforeValidator(_split_commas),
    pydantic.AfterValidator(_check_origins),
]
Networks = Annotated[tuple[Network, ...], pydantic.BeforeValidator(_parse_networks)]
RootPath = Annotated[
    str,
    pydantic.BeforeValidator(
        lambda value: value.rstrip("/") if isinstance(value, str) else value
    ),
    matching(
        r"(/[A-Za-z0-9._~-]+)*",
        "a path such as /ml, of letters, digits, dots, `_`, `~` and `-`",
    ),
]

DECODERS_BESIDE_CPU_INFERENCE = 2
MAX_DECODERS = 8  # of one process

# Bytes of all request bodies that are arriving; a machine with little memory has less (`upload_budget`)
MAX_UPLOAD_BYTES = 256_000_000
LARGE_BODY_SHARE = 7 / 8  # of these bytes; the rest is reserved for small bodies
LARGEST_BODY = int(MAX_UPLOAD_BYTES * LARGE_BODY_SHARE)  # that is ever admitted
VARIABLE_PREFIX = "SOPDEPLOY_"
FILE_VARIABLE = "SOPDEPLOY_CONFIG"
PORT_VARIABLE = "PORT"  # of Cloud Run, Heroku and others
PILLOW_PIXELS = 178_956_970  # Pillow rejects larger images itself


def setting(default: Any, meaning: str) -> Any:
    """Declare a setting; *meaning* is the help of its flag and its description in the documentation."""
    return pydantic.Field(default, description=meaning)


class Settings(StrictModel):
    """Network, limits, batching, devices and logging of one server process."""

    host: str = setting(
        "127.0.0.1",
        "address to listen on; 0.0.0.0: every IPv4 address of this machine; *: also IPv6 addresses",
    )
    port: Port = setting(8000, "port to listen on; 0: any free port")
    ssl_certfile: Path | None = setting(
        None, "PEM file of the certificate, for HTTPS; not set: HTTP"
    )
    ssl_keyfile: Path | None = setting(
        None, "PEM file of its private key; not set: the key is in the file of the certificate"
    )

    allowed_hosts: Hosts = setting(
        (),
        "host names of this server: `shop.example`, `*.shop.example`; requests to other names get 403",
    )
    allowed_origins: Origins = setting(
        (),
        "web pages that may use this server: `https://shop.example`; `*`: all pages",
    )
    trusted_proxies: Networks = setting(
        (), "addresses or networks of proxies whose `X-Forwarded-*` headers are used"
    )
    root_path: RootPath = setting("", "prefix of all paths behind a proxy, such as `/ml`")

    max_connections: Count = setting(
        1000,
        "open connections, idle ones included; a further one closes the longest idle one, or gets 503",
    )
    max_connection_age: Seconds | None = setting(
        None,
        "connections are closed at about this age in seconds, so that new servers get clients",
    )

    max_body_bytes: Annotated[int, pydantic.Field(ge=1, le=LARGEST_BODY)] = setting(
        MAX_BYTES, "size of a request body"
    )
    max_pixels: Annotated[int, pydantic.Field(ge=1, le=PILLOW_PIXELS)] = setting(
        MAX_PIXELS, "pixels of an image"
    )
    max_images: Count = setting(
        64, "images of a request; with explain=true, an image counts as 50"
    )
    top_k: Count | None = setting(
        None,
        "classes in a response; not set: 5 (multi-label network: all that reach their threshold)",
    )

    queue_size: Count = setting(256, "images in progress or waiting; further images get 429")
    request_timeout: Seconds = setting(
        30.0, "seconds from the last byte of a request to its response"
    )
    lame_duck_seconds: Delay = setting(
        0.0,
        "seconds between SIGTERM and the drain, in which proxies notice that `/readyz` is 503",
    )
    drain_seconds: Seconds = setting(
        20.0, "seconds of the drain, in which admitted requests are finished"
    )

    decoders: Threads | Literal["auto"] = setting(
        "auto",
        "child processes that decode images; auto: 2 with a CPU runtime, else one per core, at most 8",
    )
    sandbox: Sandbox = setting(
        "auto",
        "sandbox of decoders; auto: if the system supports it; required: without it, do not start",
    )
    devices: Devices = setting(
        (), "devices with a process each: `0,1`, UUIDs, MIG ids or `cpu`; not set: one process"
    )
    front_ends: FrontEnds | Literal["auto"] = setting(
        "auto",
        "processes that serve HTTP for the device processes; auto: with a GPU, one per two cores, else 0",
    )
    require_signature: Path | None = setting(
        None, "public key file; bundles without its signature are refused"
    )
    runtime: RuntimeName = setting(
        "auto",
        "tensorrt, onnxruntime-cuda, onnxruntime-cpu or openvino; auto: the first usable of the first three",
    )
    engine_cache: Path | None = setting(
        None, "folder of TensorRT engines; not set: next to the bundle"
    )
    threads: Threads | None = setting(None, "CPU threads of the runtime; not set: one per core")
    max_batch: Count | None = setting(
        None, "images per batch; not set: 4 on CPUs, else export's --max-batch"
    )
    follow: bool = setting(
        False,
        "check each second whether a link to a bundle has changed, and then reload the bundle",
    )
    examples: Path | None = setting(None, "folder of photos that the web page offers to try")
    keep: Path | None = setting(
        None,
        "folder in which uncertain and reported photos are kept for labels; not set: no photos are kept",
    )
    keep_bytes: PositiveBytes = setting(
        1_000_000_000,
        "size of the folder `keep`; the oldest photos that nobody has moved are deleted",
    )
    keep_days: Annotated[float, pydantic.Field(gt=0, le=36_500)] = setting(
        30.0, "days after which kept photos are deleted"
    )
    keep_sample: Fraction = setting(
        0.01, "share of all photos that are also kept, as a random sample"
    )

    keys: Path | None = setting(
        None, "API key file of `sopdeploy key`; not set: no authentication"
    )

    log: LogForm | None = setting(
        None,
        "json or console; not set: console on terminals, elsewhere json with warnings only",
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "least important lines that are logged; debug adds health checks"
    )

    def classes_per_image(self, *, multi_label: bool) -> int | None:
        """Return `top_k`; if it is not set, 5, or None (all classes) if *multi_label*."""
        return self.top_k or (None if multi_label else 5)

    @property
    def scheme(self) -> Literal["http", "https"]:
        """The scheme of the server's URLs."""
        return "http" if self.ssl_certfile is None else "https"

    def runtime_needs_gpu(self) -> bool | None:
        """Tell whether the runtime needs a GPU; None for `auto`, and for one that does not say so."""
        if self.runtime == "auto":
            return None
        needed: bool | None = getattr(RUNTIMES.find(self.runtime), "needs_gpu", None)
        return needed

    @pydantic.model_validator(mode="after")
    def _check_combinations(self) -> "Settings":
        """Raise `ValueError` for settings that exclude each other, or with which no request is served."""
        # Devices and runtime; one of another package may not say whether it needs a GPU.
        if "cpu" in self.devices and self.runtime_needs_gpu():
            raise ValueError(f"runtime={self.runtime} needs a GPU; remove cpu from devices")
        if set(self.devices) - {"cpu"} and self.runtime_needs_gpu() is False:
            raise ValueError(
                f"runtime={self.runtime} uses the CPU; set devices=cpu, or remove it"
            )

        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ValueError("ssl_keyfile needs ssl_certfile; add it")

        # Otherwise, a request of so many images would never be admitted.
        if self.max_images > self.queue_size:
            sizes = (
                f"max_images ({self.max_images}) is larger than queue_size ({self.queue_size})"
            )
            raise ValueError(f"{sizes}; lower it")

        return self


def load_settings(file: str | Path | None = None, /, **flags: Any) -> Settings:
    """Load settings from *flags* (None is ignored), the environment, the TOML *file* and the defaults.

    Raises `ConfigError` for a missing or malformed file, for all settings that have left, and for
    the first unknown or invalid setting.
    """
    # Read the file.
    values: dict[str, Any] = {}
    if file is None and os.environ.get(FILE_VARIABLE):
        file = os.environ[FILE_VARIABLE]
    if file is not None:
        file = Path(file)
        if not file.is_file():
            raise ConfigError(
                f"{file}: settings file not found; check its name and SOPDEPLOY_CONFIG"
            )

        try:
            values = parse_toml(read_text(file))
        except OSError as problem:
            raise ConfigError(
                f"{file}: cannot be read ({problem.strerror}); check its permissions"
            ) from problem
        except ValueError as problem:
            raise ConfigError(f"{file}: {problem}; correct the file") from problem

    # Platforms tell a program its port by a variable. Elsewhere it may be one of another program.
    if (port := os.environ.get(PORT_VARIABLE, "")).isdecimal():
        values.setdefault("port", port)

    # The environment goes before the file, and flags go before the environment.
    for name in Settings.model_fields:
        if (text := os.environ.get(variable_of(name))) is not None:
            values[name] = text

    values |= {name: value for name, value in flags.items() if value is not None}

    # Who upgrades learns at once what has left.
    if former := sorted(FORMER_SETTINGS.keys() & values.keys()):
        raise ConfigError(_describe_former(former))

    # Check the settings; the error tells what to do.
    try:
        return Settings(**values)
    except pydantic.ValidationError as problem:
        first = problem.errors()[0]
        hint = ""
        if shown(first.get("input", "")).startswith("'tcp://"):
            hint = " (set by a Kubernetes Service named sopdeploy: give the pod `enableServiceLinks: false`)"
        elif first["type"] == "extra_forbidden":
            hint = "; `sopdeploy serve --print-config` lists all settings"

        raise ConfigError(f"settings: {first_problem(problem, values)}{hint}") from problem


def parse_assignments(assignments: Iterable[str], **flags: Any) -> dict[str, Any]:
    """Parse `name=value` *assignments*, which *flags* that are not None override; raises `ConfigError`."""
    assigned: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals and name in Settings.model_fields:
            raise ConfigError(f"{name}: give it a value, {name}=VALUE")

        if name not in {*Settings.model_fields, *FORMER_SETTINGS}:
            hint = did_you_mean(
                name, Settings.model_fields.keys(), "`--print-config` lists all settings"
            )
            raise ConfigError(f"{name}: expected name=value with the name of a setting; {hint}")

        assigned[name] = value
    return assigned | {name: value for name, value in flags.items() if value is not None}


def variable_of(name: str) -> str:
    """Return the environment variable of the setting *name*."""
    return f"{VARIABLE_PREFIX}{name}".upper()


def describe_unused_variables() -> list[str]:
    """Say which environment variables that start with `SOPDEPLOY_` have no effect.

    Raises `ConfigError` if a server would be less protected without the effect that one had.
    """
    former = _former_variables()
    if any(FORMER_SETTINGS[name].protected(text) for name, text in former.items()):
        raise ConfigError(_describe_former())

    known = {variable_of(name) for name in (*Settings.model_fields, *former)}
    known |= {FILE_VARIABLE, VARIABLE}  # `VARIABLE` is that of `sopdeploy.plugins`
    unknown = sorted(
        name for name in os.environ if name.startswith(VARIABLE_PREFIX) and name not in known
    )

    notes = [
        f"environment variable {name} is not a setting and has no effect" for name in unknown
    ]
    return [*notes, _describe_former()] if former else notes


def _former_variables() -> dict[str, str]:
    """Return the values of the environment variables of `FORMER_SETTINGS`, by the names of the settings."""
    texts = {name: os.environ.get(variable_of(name)) for name in FORMER_SETTINGS}
    return {name: text for name, text in texts.items() if text is not None}


def _describe_former(names: Iterable[str] = ()) -> str:
    """Say what replaces the settings *names*, which have left, and those of environment variables."""
    places = {name: name for name in names}
    places |= {variable_of(name): name for name in _former_variables()}

    listed = (
        f"{place} (instead: {FORMER_SETTINGS[name].instead})" for place, name in places.items()
    )
    return f"settings: these have left, remove them: {', '.join(listed)}"


def to_toml(settings: Settings) -> str:
    """Format *settings* as a settings file; settings without a value become comments."""
    lines = []

    for name, value in settings.model_dump(mode="json").items():
        # JSON text is also TOML, without escapes of surrogate pairs such as \ud83d\ude00, which
        # TOML forbids.
        text = json.dumps(value, ensure_ascii=False)
        lines.append(f"# {name} is not set" if value is None else f"{name} = {text}")
    return "\n".join(lines) + "\n"


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches *host*."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def decoders_per_process(num_processes: int) -> int:
    """Return how many decoders each of *num_processes* without CPU inference has: one per core, from 2 to 8."""
    per_core = usable_cores() // num_processes
    return max(DECODERS_BESIDE_CPU_INFERENCE, min(MAX_DECODERS, per_core))
