"""The server's settings: every one is a flag, a `SOPDEPLOY_` environment variable and a line in a file.

A flag wins over the environment (`SOPDEPLOY_PORT=9000`), that over the file (`port = 9000`, TOML), that over
the default. The file is the one given, else what `SOPDEPLOY_CONFIG` names.
"""

import difflib
import ipaddress
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from sopdeploy.config import Count, first_problem
from sopdeploy.errors import ConfigError

RuntimeName = Literal["auto", "onnxruntime-cpu", "onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt"]
DecodeWay = Literal["exact", "fast", "nvimagecodec"]
Delay = Annotated[float, pydantic.Field(ge=0, le=10_000)]
Port = Annotated[int, pydantic.Field(ge=0, le=65_535)]
LogForm = Literal["json", "console"]
Seconds = Annotated[float, pydantic.Field(gt=0, le=86_400)]
Hosts = Annotated[tuple[str, ...], NoDecode, pydantic.BeforeValidator(lambda given: separated(given))]
Device = Annotated[str, pydantic.Field(pattern=r"^(cpu|[0-9]{1,3})$")]
Devices = Annotated[tuple[Device, ...], NoDecode, pydantic.BeforeValidator(lambda given: separated(given))]

PREFIX = "SOPDEPLOY_"
FILE_VARIABLE = "SOPDEPLOY_CONFIG"
FAULTS_VARIABLE = "SOPDEPLOY_FAULTS"
WORKER_VARIABLE = "SOPDEPLOY_WORKER"  # what `supervisor` tells the processes it starts
PILLOW_PIXELS = 178_956_970  # above this Pillow itself refuses a picture


class Settings(BaseSettings):
    """How one server process listens, what it refuses and how it batches."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", allow_inf_nan=False)

    host: str = "127.0.0.1"  # who can reach it; 0.0.0.0: every address of this machine
    port: Port = 8000  # 0: any free port

    health_port: Port | None = None  # probes and metrics on a thread of their own, without keys
    max_loop_lag_seconds: Seconds = 5.0  # an event loop that is later than this: not alive

    max_connections: Count = 1000  # one more closes the longest idle one, or gets 503
    max_idle_connections: Count = 500  # one more closes the longest idle one
    keep_alive_seconds: Count = 65  # longer than the idle time of common load balancers
    head_seconds: Seconds = 10.0  # of a request's head, from its first byte to its last
    max_url_bytes: Count = 8192  # path and query
    max_headers: Count = 100  # of one request
    max_header_bytes: Count = 32_768  # of all headers of one request
    write_seconds: Seconds = 30.0  # for which a client may not read

    max_body_bytes: Count = 20_000_000  # of one request
    max_json_bytes: Count = 16_000_000  # of a JSON body, or of the JSON before binary tensors
    max_upload_bytes: Count = 256_000_000  # of all bodies not yet answered
    min_body_rate: Count = 10_000  # of a request, in bytes per second, after body_grace_seconds
    body_grace_seconds: Seconds = 5.0  # for which a body may be as slow as it likes
    max_pixels: Annotated[int, pydantic.Field(ge=1, le=PILLOW_PIXELS)] = 50_000_000  # of one picture
    max_images: Count = 32  # in one request
    top_k: Count = 5  # classes in an answer that asks for no other number

    url_hosts: Hosts = ()  # `host` or `host:port` to fetch images from; none: URLs are refused
    url_plain_http: bool = False  # fetch from http:// too
    url_seconds: Seconds = 5.0  # from the name of the host to the last byte
    url_fetches: Count = 16  # at once; one more gets 429

    queue_size: Count = 256  # images admitted and not yet answered; one more gets 429
    deadline_seconds: Seconds = 30.0  # from the first byte of a request to its answer
    drain_seconds: Seconds = 20.0  # what SIGTERM leaves for the requests already admitted

    decoders: Count = 2  # threads that turn bytes into pixels
    decode: DecodeWay = "exact"  # fast: large JPEGs at a fraction of their size; nvimagecodec: on the GPU
    fast_decode_samples: Path | None = None  # a folder of JPEGs to check that on too
    parsers: Count = 2  # threads that read JSON
    devices: Devices = ()  # one process for each, GPUs by number or `cpu`; none: this process alone
    verify_key: Path | None = None  # serve only bundles signed by this public key; see `sopdeploy sign`
    runtime: RuntimeName = "auto"  # auto: the first that was set up here
    engine_cache: Path | None = None  # of TensorRT; not set: beside the bundle
    cuda_graphs: bool = False  # TensorRT: a profile of one batch size, such as 1, starts by a single call
    threads: Count | None = None  # of the engine; not set: one per core
    max_batch: Count | None = None  # not set: 4 on a CPU, else what the bundle was verified for
    max_queue_delay_ms: Delay = 0.0  # how long an idle engine waits for more images
    engine_timeout_seconds: Seconds | None = None  # a batch may take; not set: 20 times the usual, >= 4 s
    model_control: bool = False  # may clients load, unload and swap models? Needs keys where others can ask

    keys: Path | None = None  # the file of `sopdeploy key`: who may ask, and how often; not set: everybody
    metrics_need_key: bool = False  # else /metrics is open, as /livez and /readyz always are

    log: LogForm | None = None  # json, console; not set: console on a terminal, else JSON of warnings only
    log_level: Literal["debug", "info", "warning", "error"] = "info"  # debug also logs probes and scrapes
    startup_timeline: bool = False  # log where the time of the start went, whatever the log level
    tracing: bool = False  # send OpenTelemetry spans to OTEL_EXPORTER_OTLP_ENDPOINT; needs the extra `otel`

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return where settings come from, the strongest first."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @pydantic.model_validator(mode="after")
    def _devices_are_alike(self) -> "Settings":
        if self.devices and self.model_control:
            raise ValueError("model_control is for one process; with devices, start the server anew instead")
        if self.devices and self.health_port is not None:
            raise ValueError("health_port is for one process; with devices, ask the port of the server")
        return self

    @pydantic.model_validator(mode="after")
    def _samples_are_for_the_fast_way(self) -> "Settings":
        if self.fast_decode_samples is not None and self.decode == "exact":
            raise ValueError("fast_decode_samples is for other ways to decode; decode=exact needs no check")
        return self

    @pydantic.model_validator(mode="after")
    def _request_fits_the_queue(self) -> "Settings":
        if self.max_images > self.queue_size:
            raise ValueError(f"max_images ({self.max_images}) is larger than queue_size ({self.queue_size})")
        return self

    @pydantic.model_validator(mode="after")
    def _models_are_not_everybodys(self) -> "Settings":
        if self.model_control and self.keys is None and not is_loopback(self.host):
            raise ValueError(
                f"model_control on {self.host} without keys would let everybody swap models; "
                "make a key with the scope admin (`sopdeploy key NAME --file keys.toml --admin`)"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _body_fits_the_room(self) -> "Settings":
        if self.max_body_bytes > self.max_upload_bytes * 7 // 8:
            raise ValueError(
                f"max_body_bytes ({self.max_body_bytes}) is larger than 7/8 of max_upload_bytes "
                f"({self.max_upload_bytes})"
            )
        return self


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach *host*."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def separated(given: Any) -> Any:
    """Return the parts of the text *given*, with commas between them; a list stays as it is."""
    if not isinstance(given, str):
        return given
    return tuple(part.strip().lower() for part in given.split(",") if part.strip())


def load_settings(file: Path | None = None, /, **given: Any) -> Settings:
    """Return the settings of *given* (a `None` means not given), the environment, *file* and the defaults.

    Raises `ConfigError` naming the first setting that is unknown or out of its range, or a file that is not
    TOML.
    """
    named = os.environ.get(FILE_VARIABLE)
    path = file or (Path(named) if named else None)

    class Sourced(Settings):
        model_config = SettingsConfigDict(toml_file=readable(path))

    try:
        return Sourced(**{name: value for name, value in given.items() if value is not None})
    except pydantic.ValidationError as problem:
        raise ConfigError(f"settings: {first_problem(problem)}{service_link(problem)}") from problem
    except ValueError as problem:  # the file is no TOML
        raise ConfigError(f"{path}: not TOML ({problem})") from problem


def readable(path: Path | None) -> Path | None:
    """Return *path*, or raise `ConfigError` where it is given and no file."""
    if path is not None and not path.is_file():
        raise ConfigError(f"{path}: no settings file here")
    return path


def service_link(problem: pydantic.ValidationError) -> str:
    """Return a hint where Kubernetes, not a person, has set the port."""
    if str(problem.errors()[0].get("input", "")).startswith("tcp://"):
        return " (set by a Kubernetes Service named sopdeploy: give the pod `enableServiceLinks: false`)"
    return ""


def assigned(assignments: Iterable[str]) -> dict[str, str]:
    """Return the settings of *assignments*, each `name=value`; raises `ConfigError` for any other form."""
    pairs = [text.partition("=") for text in assignments]
    for name, equals, _ in pairs:
        if not equals or name not in Settings.model_fields:
            close = difflib.get_close_matches(name, Settings.model_fields, n=1)
            hint = f"did you mean {close[0]}?" if close else "`--print-config` shows every setting"
            raise ConfigError(f"--set {name}: say name=value with the name of a setting; {hint}")
    return {name: value for name, _, value in pairs}


def said(assignments: Iterable[str], **flags: Any) -> dict[str, Any]:
    """Return the settings of *assignments*, `name=value`, and over them the *flags* that were given."""
    return {**assigned(assignments), **{name: value for name, value in flags.items() if value is not None}}


def unused_variables() -> list[str]:
    """Return the variables of the environment that look like settings and are none."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields} | {FILE_VARIABLE, FAULTS_VARIABLE}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def as_toml(settings: Settings) -> str:
    """Return *settings* as the lines of a settings file; what is not set stands in a comment."""
    lines = []
    for name, value in settings.model_dump(mode="json").items():
        lines.append(f"# {name} is not set" if value is None else f"{name} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"
