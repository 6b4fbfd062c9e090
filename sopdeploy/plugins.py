"""Parts that are registered by entry points: optional parts of this project and plug-ins of other packages.

A package registers an object in its `pyproject.toml`, under the name that users type:

    [project.entry-points."sopdeploy.poolings"]
    std = "my_package.std:StdConfig"

`KINDS` lists what a plug-in can register. It is imported when a user types its name; `sopdeploy models`
imports all networks. `SOPDEPLOY_PLUGINS=off` switches plug-ins off. Names of this project come first.
"""

import os
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sopdeploy.errors import ConfigError, first_line

if TYPE_CHECKING:  # its import takes half as long as `sopdeploy --help`
    from importlib.metadata import EntryPoint

VARIABLE = "SOPDEPLOY_PLUGINS"
KINDS = {  # by group of entry points
    "sopdeploy.models": "sopdeploy.models.base.Entry",
    "sopdeploy.poolings": "a subclass of sopdeploy.layers.pooling.base.PoolingConfig",
    "sopdeploy.data": "a subclass of sopdeploy.data.base.DataSource",
    "sopdeploy.decoders": "sopdeploy_service.images.decode.Load",
    "sopdeploy.runtimes": "sopdeploy_service.runtime.base.OpenRuntime",
}


def parts(group: str) -> Mapping[str, str]:
    """Return the parts of this project in *group*: `module:object` by name."""
    return _installed_parts().get(group, {})


@cache
def _installed_parts() -> Mapping[str, Mapping[str, str]]:
    """Read the entry points of the installed sopdeploy, without `importlib.metadata`."""
    pattern = "sopdeploy-*.dist-info/entry_points.txt"
    file = next((found for folder in sys.path for found in Path(folder).glob(pattern)), None)
    if file is None:
        raise ConfigError("sopdeploy: its metadata is missing; install it with pip")
    groups: dict[str, dict[str, str]] = {}
    lines: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        name, equals, value = line.partition("=")
        if equals:
            lines[name.strip()] = value.strip()
        elif line.startswith("["):
            lines = groups.setdefault(line.strip("[] "), {})
    return groups


def load_part(value: str) -> Any:
    """Import `module:object` or `module`."""
    from pkgutil import resolve_name  # noqa: PLC0415 - help does not need it

    return resolve_name(value if ":" in value else f"{value}:")


def load_parts(group: str) -> list[Any]:
    """Import the parts of this project in *group*."""
    return [load_part(value) for value in parts(group).values()]


def find(group: str, name: str, kind: Any = object) -> Any:
    """Import the part or the plug-in *name* of *group*; None if there is none.

    Raises `ConfigError` for a plug-in that cannot be imported, and for one that is no *kind*.
    """
    if name in parts(group):
        return load_part(parts(group)[name])
    points = [point for point in installed_plugins() if (point.group, point.name) == (group, name)]
    if len(points) > 1:
        both = " and ".join(sorted(map(distribution, points)))
        raise ConfigError(f"{name}: {both} register it in {group}; uninstall one of them")
    return _load_plugin(points[0], kind) if points else None


def load_plugins(group: str, kind: Any) -> dict[str, dict[str, Any]]:
    """Import the plug-ins of *group*; return their objects by distribution and name.

    Warns of a plug-in that `find` rejects.
    """
    loaded: dict[str, dict[str, Any]] = {}
    for point in installed_plugins():
        if point.group == group:
            try:
                found = find(group, point.name, kind)
            except ConfigError as error:
                _warn(str(error))
            else:
                loaded.setdefault(distribution(point), {})[point.name] = found
    return loaded


@cache  # once for each message
def _warn(message: str) -> None:
    import logging  # noqa: PLC0415 - help does not need it

    logging.getLogger("sopdeploy.plugins").warning(message)


def _load_plugin(point: "EntryPoint", kind: Any) -> Any:
    what = f"plug-in {point.name} of {distribution(point)}"
    try:
        found = point.load()
    except (Exception, SystemExit) as error:  # code of others
        raise ConfigError(
            f"{what} cannot be imported ({first_line(error)}); correct or uninstall it, or set {VARIABLE}=off"
        ) from error
    if re.fullmatch(r"[A-Za-z0-9._-]+", point.name) is None:
        raise ConfigError(
            f"{what} has a name with other characters than letters, digits, `.`, `_` and `-`; uninstall it"
        )
    if not isinstance(found, kind) and not (isinstance(found, type) and issubclass(found, kind)):
        raise ConfigError(f"{what} is not {KINDS[point.group]}; correct or uninstall it")
    return found


@cache
def _other_points() -> "tuple[EntryPoint, ...]":
    from importlib.metadata import entry_points  # noqa: PLC0415 - see `EntryPoint`

    points = (point for group in KINDS for point in entry_points(group=group))
    return tuple(point for point in points if point.dist is None or point.dist.name != "sopdeploy")


def installed_plugins() -> "tuple[EntryPoint, ...]":
    """List the entry points of other packages; none if `SOPDEPLOY_PLUGINS` is `off`.

    Raises `ConfigError` for another value than `on` and `off`.
    """
    wanted = os.environ.get(VARIABLE, "on")
    if wanted not in {"on", "off"}:
        raise ConfigError(f"{VARIABLE}={wanted}: write on or off")
    return _other_points() if wanted == "on" else ()


def distribution(point: "EntryPoint") -> str:
    """Return name and version of the package that registers *point*."""
    return "a package without metadata" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def makers(objects: Iterable[object]) -> dict[str, str]:
    """Return the versions of the plug-ins, by distribution, that define a class of *objects*."""
    roots = {type(item).__module__.partition(".")[0] for item in objects}
    return {
        point.dist.name: point.dist.version
        for point in installed_plugins()
        if point.dist is not None and point.module.partition(".")[0] in roots
    }
