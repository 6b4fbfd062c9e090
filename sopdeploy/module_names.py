"""Dotted names of modules and tensors, as `named_modules()` and `state_dict()` list them."""

from collections.abc import Iterable


def is_in(name: str, module: str) -> bool:
    """Check whether *name* is *module* or one of its submodules or tensors."""
    return name == module or name.startswith(f"{module}.")


def is_in_any(name: str, modules: Iterable[str]) -> bool:
    """Check whether *name* is one of *modules* or one of their submodules or tensors."""
    return any(is_in(name, module) for module in modules)
