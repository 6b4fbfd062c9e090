"""Build a network that the user names as `module:callable`.

`network_builder` imports and runs the user's code. Only the command line calls it, and only for
names that the user typed: never because of a checkpoint or a bundle.
"""

import importlib
import pkgutil
import socket
import sys
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from sopdeploy.errors import ConfigError, first_line
from sopdeploy.models.timm_networks import import_timm
from sopdeploy_export.options import Takes
from sopdeploy_export.pixels.transform import Transform
from sopdeploy_export.user_network.import_path import TIMM, check_builder, parse_option

_ADVICE_IMPORT = (
    "mend or install that, and put what a script does below `if __name__ == '__main__':`"
)
_ADVICE_OFFLINE = (
    "it loads something from the network, which the weight file replaces: switch that off by an option "
    "such as pretrained=false, or connect this machine"
)


def network_builder(
    setting: str, import_path: str, option_texts: Sequence[str]
) -> Callable[[], nn.Module]:
    """Create a function that builds the network *import_path*, `package.module:callable`.

    *option_texts* are its options, as `parse_option` reads them. Messages say that *import_path*
    is the value of *setting*. Raises `ConfigError` if it cannot be imported; the created function
    raises it if the network cannot be built.
    """
    check_builder(setting, import_path, option_texts)
    invalid = partial(ConfigError, setting=setting, value=import_path)
    builder = _find_timm(import_path) or _import_callable(import_path, invalid)
    options = dict(map(parse_option, option_texts))
    first_names = list[str]()  # of the tensors of the network that the first call builds

    def build() -> nn.Module:
        try:
            with without_arguments():
                network = builder(**options)
        except (Exception, SystemExit) as error:  # the user's code
            advice = _ADVICE_OFFLINE if _is_of_connection(error) else "check its options"
            raise invalid(f"cannot be built ({first_line(error)}); {advice}") from error
        if not isinstance(network, nn.Module):
            raise invalid(f"returned a {type(network).__name__}, not a torch.nn.Module")
        if any(map(is_lazy, chain(network.parameters(), network.buffers()))):
            raise invalid(
                "returned lazy layers without weights; run them once on an image "
                "in the function"
            )

        # A second network has to be the same one.
        names = list(network.state_dict())
        first_names.extend(names if not first_names else ())
        different = [
            name for name in first_names + names if (name in first_names) != (name in names)
        ]
        if different:
            raise invalid(
                f"builds another network at its second call ({different[0]} is in one of them only): it "
                "keeps something between calls, such as a default list or a global variable; make it in the function"
            )
        return network

    return build


def _find_timm(import_path: str) -> Callable[..., Any] | None:
    """Return what builds the network of *import_path*, `timm:NAME`; None for an import path.

    NAME may be one that `sopdeploy.timm` registers. Raises the errors of `import_timm`.
    """
    package, _, name = import_path.partition(":")
    if package != TIMM or hasattr(importlib.import_module(TIMM), name):  # timm:create_model
        return None
    importlib.import_module("sopdeploy.timm")  # registers networks
    return partial(import_timm(name).create_model, name)


def import_transform(import_path: str, takes: Takes | None = None) -> Transform:
    """Import the transform *import_path*, `package.module:callable`; *takes* is that of `Transform`.

    Raises `ConfigError` if it cannot be imported, or if it takes no image.
    """
    check_builder("transform", import_path, ())
    invalid = partial(ConfigError, setting="transform", value=import_path)
    return Transform(_import_callable(import_path, invalid), import_path, takes)


def _is_of_connection(error: BaseException | None) -> bool:
    """Tell whether *error*, or one that led to it, is that of a connection or a host name."""
    while error is not None:
        # Clients of HTTP define errors of their own, which are subclasses or have such a cause.
        if isinstance(error, ConnectionError | socket.gaierror | urllib.error.URLError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _import_callable(
    import_path: str, invalid: Callable[[str], ConfigError]
) -> Callable[..., Any]:
    """Import *import_path*, which `check_builder` accepts.

    Raises what *invalid* makes of a message if this fails.
    """
    try:
        with without_arguments():
            imported: Any = pkgutil.resolve_name(import_path)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        reason = first_line(error)
        raise invalid(f"cannot be imported ({reason}); {_ADVICE_IMPORT}") from error
    if not callable(imported):
        raise invalid(
            f"is a {type(imported).__name__}, not a function or a class; name one of these"
        )
    return imported


@contextmanager
def without_arguments() -> Iterator[None]:
    """Hide the arguments of this command in the block from code that reads those of its own script."""
    arguments = sys.argv
    sys.argv = arguments[:1]
    try:
        yield
    finally:
        sys.argv = arguments
