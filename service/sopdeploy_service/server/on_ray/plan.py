"""Build a Ray Serve configuration from settings and bundles, without importing Ray.

Ray scales the replicas and routes requests to them; the replicas form batches. Ray may therefore send a
replica more requests than one batch, and starts another replica if replicas have more requests than one batch
each.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml

from sopdeploy.bundle.folder import read_manifest
from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError
from sopdeploy.files import atomic_write, writing
from sopdeploy_service.inference.loader import LARGEST_ON_CPU
from sopdeploy_service.server.on_ray.scale import ScaleOptions
from sopdeploy_service.settings import Settings

NAME = "sopdeploy"  # of the application and of its only deployment
IMPORT_PATH = "sopdeploy_service.server.on_ray.application:build_application"
HEALTH_CHECK_SECONDS = 2.0  # Ray's default of 10 would keep a dead replica too long
SPARE_SECONDS = 1.0  # so that the server's own timeout responds first, with an error code
COMMENT = (
    "# Written by `sopdeploy ray`. `serve run FILE` starts it here, `serve deploy FILE` on a cluster.\n"
    "# `serve deploy` again, with other bundles in user_config, swaps them and drops no request.\n"
)

_SINGLE_PROCESS = {  # settings that must have their default, and what to use instead
    "devices": "Ray assigns a device to each replica; use --gpus-per-replica and --replicas",
    "follow": "a link may lead elsewhere on each machine; deploy another user_config instead",
    "front_ends": "a replica is one process; use --replicas",
    "health_port": "replicas of one machine would conflict; Ray checks their health itself",
    "keep": "one process writes to the folder; keep photographs with `sopdeploy serve`",
    "memory_budget": "Ray multiplexes models itself; serve the bundles with `sopdeploy serve`",
    "model_control": "it would change one replica only; deploy another user_config instead",
}


class UserConfig(StrictModel):
    """Configuration that may change while replicas run: bundle paths by name, valid on all machines."""

    bundles: Annotated[dict[str, Path], pydantic.Field(min_length=1)]


def build_config(bundles: Mapping[str, Path], settings: Settings, scale: ScaleOptions) -> dict[str, Any]:
    """Build the Ray Serve config of *bundles* for `serve deploy` and `serve run`.

    Raises `ConfigError` for *settings* that need a single process and `BundleError` for an invalid manifest.
    """
    check_settings(settings)
    settings = settings.model_copy(update={"threads": settings.threads or scale.cpus_per_replica})
    return {
        "proxy_location": "EveryNode",
        "http_options": http_options(settings),
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": {"settings": changed_settings(settings)},
                "deployments": [{"name": NAME, **deployment(bundles, settings, scale)}],
            }
        ],
    }


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write *config* to *path*; raises `ConfigError` if that fails."""
    text = f"{COMMENT}{yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)}"
    with writing(path, ConfigError), atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def http_options(settings: Settings) -> dict[str, Any]:
    """Build the options of Ray's HTTP proxies."""
    return {
        "host": settings.host,
        "port": settings.port,
        "request_timeout_s": settings.request_timeout + SPARE_SECONDS,
        "keep_alive_timeout_s": settings.keep_alive_seconds,
    }


def deployment(bundles: Mapping[str, Path], settings: Settings, scale: ScaleOptions) -> dict[str, Any]:
    """Build the options of the deployment; autoscaling targets one full batch per replica."""
    options: dict[str, Any] = {
        "max_ongoing_requests": settings.queue_size,
        "max_queued_requests": settings.queue_size,
        "user_config": {"bundles": {name: str(path.resolve()) for name, path in bundles.items()}},
        "graceful_shutdown_timeout_s": settings.drain_seconds,
        "health_check_period_s": HEALTH_CHECK_SECONDS,
        "health_check_timeout_s": settings.max_loop_lag_seconds,
        "ray_actor_options": {"num_cpus": scale.cpus_per_replica, "num_gpus": scale.gpus_per_replica},
    }
    if scale.max_replicas is None:
        return {"num_replicas": scale.replicas or 1, **options}
    if settings.max_batch is not None:
        batch = settings.max_batch
    elif not scale.gpus_per_replica:
        batch = LARGEST_ON_CPU
    else:
        batch = max(read_manifest(path).batch.maximum for path in bundles.values())
    scaling = {
        "min_replicas": 1 if scale.min_replicas is None else scale.min_replicas,
        "max_replicas": scale.max_replicas,
        "target_ongoing_requests": batch,
    }
    return {"autoscaling_config": scaling, **options}


def check_settings(settings: Settings) -> None:
    """Raise `ConfigError` for *settings* that need a single process: Ray starts several."""
    for name, advice in _SINGLE_PROCESS.items():
        if getattr(settings, name) not in {Settings.model_fields[name].default, "auto"}:
            raise ConfigError(f"{name}: {advice}")
    if settings.port == 0:
        raise ConfigError("port 0: Ray's proxies on all machines listen on the same port; choose one")


def changed_settings(settings: Settings) -> dict[str, Any]:
    """Select the non-default *settings* of a replica, with absolute paths."""
    changed = settings.model_dump(mode="json", exclude_defaults=True, exclude={"host", "port"})
    for name in ("keys", "require_signature", "engine_cache"):
        if name in changed:
            changed[name] = str(Path(changed[name]).resolve())
    return changed
