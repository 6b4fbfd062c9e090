"""sopdeploy: train with second-order pooling, deploy a first-order network, prove that they are equal.

`train`, `evaluate`, `export`, `predict` and `serve` do what the commands of the same names do, with the same
defaults. `create_model(name, num_classes=..., **config)` builds a network of the catalog, `list_models()`
lists the names, and `describe(name, **config)` counts parameters and multiply-adds. Importing sopdeploy does
not import torch; `predict` and `serve` do not need it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sopdeploy.api.deployment import export
    from sopdeploy.api.evaluation import evaluate
    from sopdeploy.api.serving import predict, serve
    from sopdeploy.api.training import train
    from sopdeploy.models.describe import describe
    from sopdeploy.models.registry import create_model, list_models

__version__ = "0.1.0"
__all__ = [
    "__version__", "create_model", "describe", "evaluate", "export", "list_models", "predict", "serve",
    "train",
]  # fmt: skip

_MODULES = {
    "create_model": "sopdeploy.models.registry",
    "describe": "sopdeploy.models.describe",
    "evaluate": "sopdeploy.api.evaluation",
    "export": "sopdeploy.api.deployment",
    "list_models": "sopdeploy.models.registry",
    "predict": "sopdeploy.api.serving",
    "serve": "sopdeploy.api.serving",
    "train": "sopdeploy.api.training",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sopdeploy' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
