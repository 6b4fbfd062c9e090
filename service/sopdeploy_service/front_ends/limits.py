"""How many front ends a server has, and their shares of its limits."""

from sopdeploy.errors import ConfigError
from sopdeploy_service.cores import cores_within_quota
from sopdeploy_service.settings import SINGLE_PROCESS, Settings

MAX_AUTO, CORES_PER_FRONT_END = 8, 4


def count_front_ends(settings: Settings) -> int:
    """Return the number of front ends per device.

    `auto` is a quarter of the cores, at most 8, divided by the number of devices. With a setting that needs a
    single process, `auto` is 1. Raises `ConfigError` if `auto` is 1 and a sandbox is required.
    """
    if settings.front_ends != "auto":
        return settings.front_ends
    cores = cores_within_quota()
    count = max(1, min(MAX_AUTO, cores // CORES_PER_FRONT_END) // max(1, len(settings.devices)))
    if any(getattr(settings, name) for name in SINGLE_PROCESS):
        count = 1
    if count == 1 and settings.sandbox == "required":
        raise ConfigError(
            f"sandbox=required: front_ends=auto is one process on {cores} cores; set front_ends=2 or more"
        )
    return count


def share_limits(settings: Settings, front_ends: int) -> dict[str, int]:
    """Divide the limits of the whole server among its *front_ends*.

    Raises `ConfigError` if the share of a front end is too small for the largest request.
    """
    smallest = {
        "queue_size": settings.max_images * front_ends,
        "max_upload_bytes": -(-settings.max_body_bytes * 8 // 7) * front_ends,
    }
    small = [f"{name}={least}" for name, least in smallest.items() if getattr(settings, name) < least]
    if small:
        raise ConfigError(
            f"{front_ends} front ends share queue_size and max_upload_bytes, and the largest request "
            f"does not fit into a share; set {', '.join(small)} or start fewer front ends"
        )
    return {name: getattr(settings, name) // front_ends for name in smallest}
