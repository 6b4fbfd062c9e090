"""Train second-order image classifiers (DSoP, GSoP, GM-SOP), detach their auxiliary branches with
proof, lower them to ONNX and TensorRT, and serve them with FastAPI.

`train`, `evaluate`, `export`, `predict`, `classify` and `serve` do what the commands of the
same names do, with the same defaults. `export_network` exports any PyTorch classifier,
`unused_modules` lists the parts that its output does not need. `dsop` and `isqrt` apply these
methods to your own network, and `register_model` gives it a name that `train` accepts.
`register_pooling`, `register_data_source`, `register_runtime` and `register_importer` add
names, too, also from a plug-in; a `DataSource` opens a `Split` of `LabeledImages`.
`create_model(name, num_classes, pretrained=True)` builds a network of the catalog,
`list_models("gsop*")` lists the names, and `describe(name)` counts parameters and
multiply-adds. `sopdeploy.timm` registers the networks in timm, `sopdeploy.layers` has the
second-order layers. Importing sopdeploy does not import torch; `predict`, `classify` and
`serve` do not need it.
"""

import os
from typing import Any

from sopdeploy.version import __version__ as __version__

# Builds of onnxruntime 1.29 and later send names and hashes of models to Microsoft unless this
# is set.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# By name: this package imports none of the rooms above it. `__init__.pyi` has the types.
_MODULES = {
    "classify": "sopdeploy_commands.classify.run",
    "ExportOptions": "sopdeploy_export.options",
    "DataSource": "sopdeploy.data.sources",
    "LabeledImages": "sopdeploy.data.photos.photo",
    "Preprocess": "sopdeploy.images.preprocess",
    "Split": "sopdeploy.data.photos.photo",
    "create_model": "sopdeploy.training.pretrained",
    "describe": "sopdeploy.models.describe",
    "dsop": "sopdeploy.models.user_network",
    "evaluate": "sopdeploy_commands.evaluate",
    "export": "sopdeploy_commands.export",
    "export_network": "sopdeploy_export.user_network.export_network",
    "isqrt": "sopdeploy.models.user_network",
    "list_models": "sopdeploy.models.registry",
    "predict": "sopdeploy_commands.predict",
    "Importer": "sopdeploy.weights.conversion",
    "register_data_source": "sopdeploy.data.sources",
    "register_importer": "sopdeploy.weights.conversion",
    "register_model": "sopdeploy.models.user_network",
    "register_pooling": "sopdeploy.layers.pooling.registry",
    "register_runtime": "sopdeploy_service.runtime.base",
    "serve": "sopdeploy_commands.serve",
    "train": "sopdeploy_commands.train",
    "unused_modules": "sopdeploy_export.user_network.admission",
}

__all__ = sorted(["__version__", *_MODULES])


def __getattr__(name: str) -> Any:
    from importlib import import_module
    from inspect import isfunction

    from sopdeploy.base.environment import missing_extras

    if name == "layers":  # a module, whose import also sets it here
        with missing_extras():
            return import_module("sopdeploy.layers")
    if name not in _MODULES:
        raise AttributeError(f"module 'sopdeploy' has no attribute {name!r}")

    with missing_extras():
        value = getattr(import_module(_MODULES[name]), name)

    if isfunction(value):
        from sopdeploy.base.arguments import checking_arguments

        value = checking_arguments(value)
        value.__module__ = __name__  # where pickle finds it
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "layers"})
