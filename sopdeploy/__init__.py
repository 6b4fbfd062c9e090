"""Train image classifiers on folders of images, export them with a proof, serve them over HTTP.

`train`, `evaluate`, `export`, `predict`, `classify` and `serve` do what the commands of the same names do,
with the same defaults. `export_network` exports any PyTorch classifier, `unused_modules` lists the parts that
its output does not need. `dsop` and `isqrt` apply these methods to your own network, and `register_model`
gives it a name that `train` accepts. `register_pooling`, `register_data_source` and `register_runtime` add
names, too, also from a plug-in. `create_model(name, num_classes=..., **config)` builds a network of the
catalog, `list_models()` lists the names, and `describe(name, **config)` counts parameters and multiply-adds.
Importing sopdeploy does not import torch; `predict`, `classify` and `serve` do not need it.
"""

import os
from typing import TYPE_CHECKING, Any

from sopdeploy.version import __version__ as __version__

if TYPE_CHECKING:
    from sopdeploy.commands.evaluate import evaluate as evaluate
    from sopdeploy.commands.export import export as export
    from sopdeploy.commands.serve import serve as serve
    from sopdeploy.commands.train import train as train
    from sopdeploy.data.sources import register_data_source as register_data_source
    from sopdeploy.images.preprocess import Preprocess as Preprocess
    from sopdeploy.layers.pooling.registry import register_pooling as register_pooling
    from sopdeploy.models.describe import describe as describe
    from sopdeploy.models.registry import create_model as create_model
    from sopdeploy.models.registry import list_models as list_models
    from sopdeploy.models.user_network import dsop as dsop
    from sopdeploy.models.user_network import isqrt as isqrt
    from sopdeploy.models.user_network import register_model as register_model
    from sopdeploy_export.options import ExportOptions as ExportOptions
    from sopdeploy_export.user_network.export_network import export_network as export_network
    from sopdeploy_export.user_network.export_network import unused_modules as unused_modules
    from sopdeploy_service.commands.batch.run import classify as classify
    from sopdeploy_service.commands.predict import predict as predict
    from sopdeploy_service.runtime.base import register_runtime as register_runtime

# Builds of onnxruntime 1.29 and later send names and hashes of models to Microsoft unless this is set.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_MODULES = {
    "classify": "sopdeploy_service.commands.batch.run",
    "ExportOptions": "sopdeploy_export.options",
    "Preprocess": "sopdeploy.images.preprocess",
    "create_model": "sopdeploy.models.registry",
    "describe": "sopdeploy.models.describe",
    "dsop": "sopdeploy.models.user_network",
    "evaluate": "sopdeploy.commands.evaluate",
    "export": "sopdeploy.commands.export",
    "export_network": "sopdeploy_export.user_network.export_network",
    "isqrt": "sopdeploy.models.user_network",
    "list_models": "sopdeploy.models.registry",
    "predict": "sopdeploy_service.commands.predict",
    "register_data_source": "sopdeploy.data.sources",
    "register_model": "sopdeploy.models.user_network",
    "register_pooling": "sopdeploy.layers.pooling.registry",
    "register_runtime": "sopdeploy_service.runtime.base",
    "serve": "sopdeploy.commands.serve",
    "train": "sopdeploy.commands.train",
    "unused_modules": "sopdeploy_export.user_network.export_network",
}

__all__ = sorted(["__version__", *_MODULES])


def __getattr__(name: str) -> Any:
    from importlib import import_module

    from sopdeploy.environment import missing_extras

    if name not in _MODULES:
        raise AttributeError(f"module 'sopdeploy' has no attribute {name!r}")
    with missing_extras():
        value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
