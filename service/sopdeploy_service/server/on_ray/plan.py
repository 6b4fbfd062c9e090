"""What Ray Serve is told: our settings and bundles in its words, without Ray.

Ray scales and routes, we batch. So a replica is sent far more requests than a batch holds, and another one is
started where more wait than that.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml

from sopdeploy.bundle.folder import read_manifest
from sopdeploy.config import Count, StrictModel, first_problem
from sopdeploy.errors import ConfigError
from sopdeploy.files import atomic_write
from sopdeploy_service.inference.loader import LARGEST_ON_CPU
from sopdeploy_service.settings import Settings

NAME = "sopdeploy"  # of the application and of its one deployment
IMPORT_PATH = "sopdeploy_service.server.on_ray.application:build"
HEALTH_CHECK_SECONDS = 2.0  # Ray's own is 10: so long a dead engine would stay
SPARE_SECONDS = 1.0  # ours says which deadline passed; Ray's limit only cuts
HEAD = (
    "# Written by `sopdeploy ray`. `serve run FILE` starts it here, `serve deploy FILE` on a cluster.\n"
    "# `serve deploy` again, with other bundles in user_config, swaps them and drops no request.\n"
)

Gpus = Annotated[float, pydantic.Field(ge=0, le=64)]


class Scale(StrictModel):
    """How many replicas, from *fewest* to *most*, and what each reserves of its machine."""

    fewest: Annotated[int, pydantic.Field(ge=0)] = 1
    most: Count = 1
    cpus: Count = 1
    gpus: Gpus = 0.0  # 0.5: two replicas share one

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> "Scale":
        if self.fewest > self.most:
            raise ValueError(f"min-replicas ({self.fewest}) is more than max-replicas ({self.most})")
        if self.gpus > 1 and not self.gpus.is_integer():
            raise ValueError(f"gpus-per-replica ({self.gpus:g}) is a share of one GPU, or whole ones")
        return self


class UserConfig(StrictModel):
    """What may change while the replicas run: the bundles by name, paths that every machine has."""

    bundles: Annotated[dict[str, Path], pydantic.Field(min_length=1)]


def config(bundles: Mapping[str, Path], settings: Settings, scale: Scale) -> dict[str, Any]:
    """Return the config of Ray Serve that answers with *bundles*, as `serve deploy` and `serve run` read it.

    Raises `ConfigError` for *settings* that mean one process, and `BundleError` for a manifest that cannot
    be read.
    """
    check(settings)
    given = settings.model_copy(update={"threads": settings.threads or scale.cpus})
    return {
        "proxy_location": "EveryNode",
        "http_options": http_options(settings),
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": {"settings": changed(given)},
                "deployments": [{"name": NAME, **deployment(bundles, given, scale)}],
            }
        ],
    }


def as_yaml(told: Mapping[str, Any]) -> str:
    """Return the file of the config *told*."""
    return f"{HEAD}{yaml.safe_dump(dict(told), sort_keys=False, allow_unicode=True)}"


def write(path: Path, told: Mapping[str, Any]) -> None:
    """Write the file of the config *told*, whole or not at all; raises `ConfigError` where it cannot."""
    try:
        with atomic_write(path) as partial:
            partial.write_text(as_yaml(told), encoding="utf-8")
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be written ({problem.strerror})") from problem


def http_options(settings: Settings) -> dict[str, Any]:
    """Return how Ray's proxies listen."""
    return {
        "host": settings.host,
        "port": settings.port,
        "request_timeout_s": settings.deadline_seconds + SPARE_SECONDS,
        "keep_alive_timeout_s": settings.keep_alive_seconds,
    }


def deployment(bundles: Mapping[str, Path], settings: Settings, scale: Scale) -> dict[str, Any]:
    """Return the options of the deployment."""
    told: dict[str, Any] = {
        "max_ongoing_requests": settings.queue_size,
        "max_queued_requests": settings.queue_size,
        "user_config": {"bundles": {name: str(path.resolve()) for name, path in bundles.items()}},
        "graceful_shutdown_timeout_s": settings.drain_seconds,
        "health_check_period_s": HEALTH_CHECK_SECONDS,
        "health_check_timeout_s": settings.max_loop_lag_seconds,
        "ray_actor_options": {"num_cpus": scale.cpus, "num_gpus": scale.gpus},
    }
    if scale.fewest == scale.most:
        return {"num_replicas": scale.most, **told}
    scaling = {
        "min_replicas": scale.fewest,
        "max_replicas": scale.most,
        "target_ongoing_requests": largest_batch(bundles, settings, scale),
    }
    return {"autoscaling_config": scaling, **told}


def scale_of(replicas: int | None, fewest: int | None, most: int | None, *, cpus: int, gpus: float) -> Scale:
    """Return the scale of *replicas*, or of *fewest* to *most*; raises `ConfigError` where they disagree."""
    if replicas is not None and (fewest, most) != (None, None):
        raise ConfigError("--replicas is a fixed number; leave it out, or --min-replicas and --max-replicas")
    if fewest is not None and most is None:
        raise ConfigError("--min-replicas: say --max-replicas too")
    fixed = 1 if replicas is None else replicas
    try:
        return Scale(
            fewest=(fixed if most is None else 1) if fewest is None else fewest,
            most=fixed if most is None else most,
            cpus=cpus,
            gpus=gpus,
        )
    except pydantic.ValidationError as problem:
        raise ConfigError(f"ray: {first_problem(problem)}") from problem


def largest_batch(bundles: Mapping[str, Path], settings: Settings, scale: Scale) -> int:
    """Return how many images one batch of a replica holds: with more requests than that, some wait."""
    if settings.max_batch is not None:
        return settings.max_batch
    if not scale.gpus:
        return LARGEST_ON_CPU
    return max(read_manifest(path).batch.maximum for path in bundles.values())


def check(settings: Settings) -> None:
    """Raise `ConfigError` where *settings* mean one process, and Ray starts several."""
    if settings.devices:
        raise ConfigError("devices: Ray gives each replica its device; say --gpus-per-replica and --replicas")
    if settings.health_port is not None:
        raise ConfigError("health_port: replicas of one machine would clash; Ray asks each for its health")
    if settings.model_control:
        raise ConfigError("model_control: one replica alone would change; deploy another user_config instead")
    if settings.port == 0:
        raise ConfigError("port 0: Ray's proxies on all machines listen on one port; choose it")


def changed(settings: Settings) -> dict[str, Any]:
    """Return those of *settings* that are not the default and not the proxies' matter."""
    found = settings.model_dump(mode="json", exclude_defaults=True, exclude={"host", "port"})
    for name in ("keys", "verify_key", "fast_decode_samples", "engine_cache"):
        if name in found:
            found[name] = str(Path(found[name]).resolve())
    return found
