"""sopdeploy: train with second-order pooling, deploy a first-order network, prove that they are equal.

`create_model(name, num_classes=..., **config)` builds a network of the catalog, `list_models()` lists the
names, and `describe(name, **config)` counts parameters and multiply-adds. Importing sopdeploy does not import
torch.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "describe", "list_models"]


def __getattr__(name: str) -> Any:
    if name in {"create_model", "list_models"}:
        from sopdeploy.models import registry

        return getattr(registry, name)
    if name == "describe":
        from sopdeploy.models.describe import describe

        return describe
    raise AttributeError(f"module 'sopdeploy' has no attribute {name!r}")
