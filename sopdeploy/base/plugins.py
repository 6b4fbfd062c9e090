"""Plug-ins: installed packages that register networks, poolings, data sources, runtimes and importers.

A package names a module in its `pyproject.toml`:

    [project.entry-points."sopdeploy.plugins"]
    acme = "acme.sopdeploy_plugin"

The module calls `register_model`, `register_pooling`, `register_data_source`,
`register_runtime` or `register_importer` of `sopdeploy`. It is imported when a name is used
that sopdeploy does not have, and where names are listed, as by `sopdeploy models`.
`SOPDEPLOY_PLUGINS=off` switches plug-ins off. Names of this project come first. Optimizers and
teachers are added to `OPTIMIZERS` and `TEACHERS` directly.

The packages of this project, such as `sopdeploy-papers`, name a function that registers their
names. It is always called, and imports no torch: it registers `module:name` in place of an
object.
"""

import logging
import os
import re
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, NamedTuple, TypeVar, get_args

from sopdeploy.base.environment import PAPERS, install_command
from sopdeploy.base.nearest import did_you_mean
from sopdeploy.errors import ConfigError, first_line

# groups of entry points
_GROUP = "sopdeploy.plugins"
RECIPES = "sopdeploy.recipes"
_THIS_PROJECT = ("sopdeploy", "sopdeploy-papers")
VARIABLE = "SOPDEPLOY_PLUGINS"
# of the teacher that is trained with its student
JOINT = "joint"
# Names of `sopdeploy-papers`, which an error tells to install where the package is missing.
OF_PAPERS = {"adahessian", JOINT, "psdr-resnet50", "psdr-resnet50-no-aux"}
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_Item = TypeVar("_Item")

log = logging.getLogger("sopdeploy.plugins")


class Registered(NamedTuple):
    """An item, or the text `module:name` from which it is imported, and the module that defines it."""

    item: Any
    module: str


class PluginRegistry(Generic[_Item]):
    """What this process and plug-ins have registered, by name; *kind* is a word for messages.

    *module* has a mapping `OWN` of this project's own items, which come first.
    """

    def __init__(self, kind: str, module: str | None = None) -> None:
        self.kind = kind
        self._module = module
        self.registered: dict[str, Registered] = {}

    def own(self) -> dict[str, _Item]:
        """Return the items of this project."""
        return {} if self._module is None else import_module(self._module).OWN

    def register(self, name: str, item: _Item | str, module: str) -> None:
        """Register *item*, which *module* defines, under *name*; the same module may replace its item.

        An item that is imported when it is used is given as `module:name`. Raises `ConfigError`
        for a name with other characters, or that another module has registered; a name of this
        project is not refused.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{self.kind} {name!r}: a name may contain only letters, digits, `.`, `_` and `-`"
            )

        before = self.registered.get(name)
        if before is not None and before.module != module:
            owner = before.module
            raise ConfigError(
                f"{self.kind} {name!r}: {owner} has registered this name; choose another one"
            )

        self.registered[name] = Registered(item, module)

    def register_config(self, config: Any, base: type[Any]) -> None:
        """Register *config*, a subclass of the pydantic model *base*, under the value of its field `kind`.

        Raises `ConfigError` if it is not such a class, or if its name is missing, and as `register`
        does.
        """
        is_subclass = isinstance(config, type) and issubclass(config, base)
        if not is_subclass:
            raise ConfigError(
                f"{self.kind}: {config!r} is not a subclass of {base.__module__}.{base.__name__}"
            )

        kind = config.model_fields.get("kind")
        names = () if kind is None else get_args(kind.annotation)
        if len(names) != 1 or not isinstance(names[0], str):
            raise ConfigError(
                f'{self.kind} {config.__name__}: add a field such as kind: Literal["my-name"]'
            )

        self.register(names[0], config, config.__module__)

    def find(self, name: str) -> _Item | None:
        """Return this project's item *name* or the one that is registered under it, else None.

        All plug-ins are imported only if nothing has this name before. Raises `ConfigError` if
        nothing is found and a plug-in cannot be imported.
        """
        if name in (own := self.own()):
            return own[name]

        problems: list[str] = []
        if name not in self.registered:
            register_own_packages()
        if name not in self.registered:
            problems = import_plugins()  # their import may register *name*

        if name in self.registered:
            item: _Item = import_if_named(self.registered[name].item)
            return item

        if problems:
            raise ConfigError(f"{self.kind} {name!r}: not found; {problems[0]}")
        return None

    def names(self) -> list[str]:
        """List this project's names, then those of plug-ins; warn of plug-ins that cannot be imported."""
        register_own_packages()
        for problem in import_plugins():
            log.warning(problem)
        return list({**self.own(), **self.registered})

    def suggest(self, name: str, otherwise: str = "") -> str:
        """Ask "did you mean NAMES?" with the known names nearest to *name*; *otherwise* if none is near."""
        if name in OF_PAPERS:
            return (
                f"the {self.kind} {name} is in a package of its own; {install_command(*PAPERS)}"
            )
        return did_you_mean(name, [*self.own(), *self.registered], otherwise)


def import_if_named(source: Any) -> Any:
    """Import what *source* names, if it is a text `module:name`; return anything else as it is."""
    if not isinstance(source, str):
        return source
    module, _, name = source.partition(":")
    return getattr(import_module(module), name)


DATA_SOURCES: PluginRegistry[Any] = PluginRegistry("data source")
IMPORTERS: PluginRegistry[Any] = PluginRegistry("importer")
# of the files of an importer that is registered as `module:name`
FIRST_BYTES: dict[str, bytes] = {}
MODELS: PluginRegistry[Any] = PluginRegistry("model", "sopdeploy.models.registry")
OPTIMIZERS: PluginRegistry[Any] = PluginRegistry("optimizer")
POOLINGS: PluginRegistry[Any] = PluginRegistry("pooling")
TEACHERS: PluginRegistry[Any] = PluginRegistry("teacher")
RUNTIMES: PluginRegistry[Any] = PluginRegistry("runtime", "sopdeploy_service.runtime.own")


def import_plugins() -> list[str]:
    """Import the modules of all plug-ins; return a line for each one that cannot be imported."""
    problems = []
    for point in installed_plugins():
        try:
            point.load()
        except (Exception, SystemExit) as error:  # code of others
            problems.append(
                f"plug-in {point.name} of {describe_distribution(point)} cannot be "
                f"imported ({first_line(error)}); correct or uninstall it, or set "
                f"{VARIABLE}=off"
            )
    return problems


def register_own_packages() -> None:
    """Let the other packages of this project register their names."""
    for point in own_entry_points(_GROUP):
        point.load()()


@cache
def own_entry_points(group: str) -> tuple[EntryPoint, ...]:
    """List the entry points of this project in *group*, by the metadata of its own installations."""
    points = entry_points(group=group)
    return tuple(
        point for point in points if point.dist is not None and point.dist.name in _THIS_PROJECT
    )


@cache
def plugin_entry_points() -> tuple[EntryPoint, ...]:
    """List the entry points of plug-ins, as they are installed at the first call."""
    own = own_entry_points(_GROUP)
    return tuple(point for point in entry_points(group=_GROUP) if point not in own)


def installed_plugins() -> tuple[EntryPoint, ...]:
    """List the entry points of plug-ins; none if `SOPDEPLOY_PLUGINS` is `off`.

    Raises `ConfigError` for another value than `on` and `off`.
    """
    wanted = os.environ.get(VARIABLE, "on")
    if wanted not in {"on", "off"}:
        raise ConfigError(f"{VARIABLE}={wanted}: write on or off")
    return plugin_entry_points() if wanted == "on" else ()


def describe_distribution(point: EntryPoint) -> str:
    """Return name and version of the package that registers *point*."""
    return (
        "a package without metadata"
        if point.dist is None
        else f"{point.dist.name} {point.dist.version}"
    )


def plugin_versions(objects: Iterable[object]) -> dict[str, str]:
    """Return the versions, by distribution, of the plug-ins that define the class of one of *objects*."""
    packages = {type(item).__module__.partition(".")[0] for item in objects}  # top-level ones
    return {
        point.dist.name: point.dist.version
        for point in installed_plugins()
        if point.dist is not None and point.module.partition(".")[0] in packages
    }
