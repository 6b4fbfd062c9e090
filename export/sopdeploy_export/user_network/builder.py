"""Build a network that the user names as `module:callable`, with options as `key=value`.

This imports and runs the user's code. Only the command line calls it, and only for names that the user typed:
never because of a checkpoint or a bundle.
"""

import pkgutil
import sys
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from sopdeploy.errors import ConfigError, first_line
from sopdeploy.training.recipe_files import parse_override


def network_builder(setting: str, import_path: str, settings: Sequence[str]) -> Callable[[], nn.Module]:
    """Create a function that builds the network *import_path*, `package.module:callable`, with *settings*.

    Messages say that *import_path* is the value of *setting*. Raises `ConfigError` if it cannot be imported;
    the created function raises `ConfigError` if the network cannot be built.
    """
    invalid = partial(ConfigError, setting=setting, value=import_path)
    if not all(import_path.partition(":")):
        raise invalid("write package.module:callable, as in torchvision.models:googlenet")
    if "" not in sys.path:
        sys.path.insert(0, "")  # finds modules in the current folder, as `python -m` does
    try:
        builder = pkgutil.resolve_name(import_path)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise invalid(f"cannot be imported ({first_line(error)}); check its name") from error
    if not callable(builder):
        raise invalid(f"is a {type(builder).__name__}, not a function or a class; name one of these")
    options = dict(map(parse_override, settings))

    def build() -> nn.Module:
        try:
            network = builder(**options)
        except (Exception, SystemExit) as error:  # the user's code
            raise invalid(f"cannot be built ({first_line(error)}); check its options") from error
        if not isinstance(network, nn.Module):
            raise invalid(f"returned a {type(network).__name__}, not a torch.nn.Module")
        return network

    return build
