"""Build a network that the user names as `module:callable`, and read its weights without running their code.

`network_builder` imports and runs the user's code. Only the command line calls it, and only for names that
the user typed: never because of a checkpoint or a bundle.
"""

import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sopdeploy.checkpoint import WEIGHTS_ADVICE, check_tensors, is_state_dict, read_pytorch
from sopdeploy.errors import ConfigError, WeightsError, first_line
from sopdeploy.files import check_is_weights
from sopdeploy.training.recipe_files import parse_override

PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile and Lightning
AVERAGING_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel


def network_builder(setting: str, import_path: str, settings: Sequence[str]) -> Callable[[], nn.Module]:
    """Create a function that builds the network *import_path*, `package.module:callable`, with *settings*.

    Messages say that *import_path* is the value of *setting*. Raises `ConfigError` if it cannot be imported;
    the created function raises `ConfigError` if the network cannot be built.
    """
    invalid = partial(ConfigError, setting=setting, value=import_path)
    if not all(import_path.partition(":")):  # the module, the colon or the callable is missing
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


def load_weights(network: nn.Module, path: Path, table: str | None = None) -> tuple[str, str]:
    """Load the file at *path* into *network*; the names and shapes of all tensors must match.

    *table* names one of several tables of tensors, such as `model_ema`. Prefixes that all names share
    (`module.`, `_orig_mod.`, `model.`) are removed unless the network has them too. Returns the table and the
    sha256 of the file. Raises `WeightsError` for a file that cannot be read or does not fit.
    """
    content, digest = read_pytorch(check_is_weights(path))
    name, tensors = _choose_table(path, content, table)
    check_tensors(path, tensors)
    expected = network.state_dict()
    if AVERAGING_COUNTER in tensors and AVERAGING_COUNTER not in expected:
        tensors = {key: tensor for key, tensor in tensors.items() if key != AVERAGING_COUNTER}
    while prefix := _shared_prefix(tensors, expected):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    for key in expected:
        if key not in tensors:
            raise WeightsError(f"{path}: {key} is missing; {_other_settings(tensors, expected)}")
        if tensors[key].shape != expected[key].shape:
            shape, expected_shape = tuple(tensors[key].shape), tuple(expected[key].shape)
            raise WeightsError(
                f"{path}: {key} is {shape} in the file and {expected_shape} in the network; check its options"
            )
    unknown = next((key for key in tensors if key not in expected), None)
    if unknown is not None:
        raise WeightsError(f"{path}: the network has no {unknown}; {_other_settings(tensors, expected)}")
    network.load_state_dict(tensors)
    return name, digest


def _choose_table(path: Path, content: Any, table: str | None) -> tuple[str, Mapping[str, Tensor]]:
    """Choose the *table* of tensors in *content*, by default the only one; return its name and tensors.

    The name is empty if *content* itself is the table.
    """
    if is_state_dict(content):
        if table is not None:
            problem = f"{path} is a single table of tensors; omit it"
            raise WeightsError(problem, setting="weights_key", value=table)
        return "", content
    tables = {}
    if isinstance(content, dict):
        tables = {str(key): value for key, value in content.items() if is_state_dict(value)}
    names = ", ".join(tables)
    if not tables:
        raise WeightsError(f"{path}: holds no table of tensors; {WEIGHTS_ADVICE}")
    if table is None and len(tables) > 1:
        remedies = {"weights_key": None}  # without a value to try: the user has to choose
        raise WeightsError(f"{path}: holds several tables of tensors ({names})", remedies=remedies)
    if table is not None and table not in tables:
        raise WeightsError(f"{path} has only {names}", setting="weights_key", value=table)
    name = next(iter(tables)) if table is None else table
    return name, tables[name]


def _shared_prefix(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Find a prefix that all names of *tensors* have and no *expected* name has; empty if there is none."""
    for prefix in PREFIXES if tensors else ():  # without names, every prefix would be shared
        expects_prefix = any(key.startswith(prefix) for key in expected)
        if not expects_prefix and all(key.startswith(prefix) for key in tensors):
            return prefix
    return ""


def _other_settings(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    shared = len(tensors.keys() & expected.keys())
    return (
        f"{shared} of {len(expected)} tensors fit: check the network and its options, or choose "
        "another table of weights"
    )
