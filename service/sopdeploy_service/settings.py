"""The server's settings: every one is a keyword, a `SOPDEPLOY_` environment variable and a default.

`SOPDEPLOY_PORT=9000` sets `port`; a keyword given to `load_settings` wins over the environment.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic_settings import BaseSettings, SettingsConfigDict

from sopdeploy.errors import ConfigError
from sopdeploy.frozen import first_problem

Count = Annotated[int, pydantic.Field(ge=1)]
RuntimeName = Literal["auto", "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt"]
Seconds = Annotated[float, pydantic.Field(gt=0, le=86_400)]

PILLOW_PIXELS = 178_956_970  # above this Pillow itself refuses a picture


class Settings(BaseSettings):
    """How one server process listens, what it refuses and how it batches."""

    model_config = SettingsConfigDict(
        env_prefix="SOPDEPLOY_", frozen=True, extra="forbid", allow_inf_nan=False
    )

    host: str = "127.0.0.1"
    port: Annotated[int, pydantic.Field(ge=0, le=65_535)] = 8000  # 0: any free port

    max_body_bytes: Count = 20_000_000
    max_json_bytes: Count = 16_000_000  # of a JSON body, or of the JSON before binary tensors
    max_pixels: Annotated[int, pydantic.Field(ge=1, le=PILLOW_PIXELS)] = 50_000_000
    max_images: Count = 32  # in one request
    top_k: Count = 5  # classes in an answer that asks for no other number

    url_hosts: tuple[str, ...] = ()  # `host` or `host:port` to fetch images from; none: URLs are refused
    url_plain_http: bool = False  # fetch from http:// too
    url_seconds: Seconds = 5.0  # from the name of the host to the last byte

    queue_size: Count = 256  # images admitted and not yet answered; one more gets 429
    deadline_seconds: Seconds = 30.0  # from the first byte of a request to its answer
    drain_seconds: Seconds = 20.0  # what SIGTERM leaves for the requests already admitted

    decoders: Count = 2  # threads that turn bytes into pixels
    runtime: RuntimeName = "auto"  # auto: the first that was set up here
    engine_cache: Path | None = None  # of TensorRT; None: beside the bundle
    threads: Count | None = None  # of the engine; None: one per core
    max_batch: Count | None = None  # None: 4 on a CPU, else what the bundle was verified for
    max_queue_delay_ms: Annotated[float, pydantic.Field(ge=0, le=10_000)] = 0.0
    engine_timeout_seconds: Seconds = 60.0  # a batch that takes longer: the engine hangs

    @pydantic.model_validator(mode="after")
    def _request_fits_the_queue(self) -> "Settings":
        if self.max_images > self.queue_size:
            raise ValueError(f"max_images ({self.max_images}) is larger than queue_size ({self.queue_size})")
        return self


def load_settings(**given: Any) -> Settings:
    """Return the settings of *given* (a `None` means not given), the environment and the defaults.

    Raises `ConfigError` naming the first setting that is unknown or out of its range.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except pydantic.ValidationError as problem:
        raise ConfigError(f"settings: {first_problem(problem)}") from problem
