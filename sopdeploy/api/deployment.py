"""Export a network of the user from a weight file: `sopdeploy export --network` and `sopdeploy inspect`."""

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pydantic
from torch import nn

from sopdeploy.backbones.timm_backbone import import_timm
from sopdeploy.config import first_problem
from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.user_files import read_class_names
from sopdeploy_export.options import ExportOptions, NetworkExportOptions, NetworkOptions
from sopdeploy_export.report.results import Exported
from sopdeploy_export.user_network.builder import network_builder
from sopdeploy_export.user_network.export_network import export_network, unused_modules
from sopdeploy_export.user_network.weights import LoadedWeights, load_weights

EXAMPLE = "timm:resnet18, torchvision:ResNet18_Weights.IMAGENET1K_V1 or FILE.json"


def load_network(weights: Path, options: NetworkOptions) -> tuple[nn.Module, LoadedWeights]:
    """Build the network of *options* and load its weights from the file *weights*."""
    network = _builder("network", options.network, options.option)()
    return network, load_weights(network, weights, options.weights_key)


def export_weights(
    weights: Path,
    source: NetworkExportOptions,
    destination: Path,
    options: ExportOptions,
    on_step: Callable[[str], None],
) -> Exported:
    """Export the network that *source* names; after a `SopdeployError`, *destination* holds nothing new."""
    if options.detach:
        raise ConfigError(
            "name the parts of the network to remove", setting="detach", remedies={"training_only": None}
        )
    if source.labels is None:
        raise ConfigError(
            "missing; give a file with one class name per line, in the order of the logits", setting="labels"
        )
    labels, preprocess = read_class_names(source.labels), read_preprocess(source.preprocess)
    plain = None if source.plain is None else _builder("plain", source.plain, source.plain_option)
    attribute = str(source.network).rpartition(":")[2].rpartition(".")[2]  # of package.module:path.attribute
    on_step("building the network")
    network, loaded = load_network(weights, source)
    return export_network(
        network,
        plain=plain,
        training_only=source.training_only,
        labels=labels,
        preprocess=preprocess,
        destination=destination,
        name=options.name or attribute,
        logits_key=_index_or_name(source.logits_key),
        allow_constants=source.allow_constants,
        options=options,
        config={
            "network": source.network,
            "settings": list(source.option),
            "plain": source.plain,
            "plain_settings": list(source.plain_option),
            "training_only": list(source.training_only),
            "logits": source.logits_key,
            "allow_constants": source.allow_constants,
            "table": loaded.table,
            "prefixes_removed": list(loaded.removed),
        },
        sha256=loaded.sha256,
        on_step=on_step,
    )


def inspect_network(weights: Path, options: NetworkOptions) -> dict[str, Any]:
    """List the parts of the network of *options* that its output does not depend on; writes nothing."""
    network, loaded = load_network(weights, options)
    logits_key = _index_or_name(options.logits_key)
    unused = unused_modules(network, read_preprocess(options.preprocess), logits_key=logits_key)
    return {
        "network": options.network,
        "num_tensors": len(network.state_dict()),
        "table": loaded.table,
        "prefixes_removed": list(loaded.removed),
        "unused": list(unused),
    }


def _builder(setting: str, name: str | None, settings: Sequence[str]) -> Callable[[], nn.Module]:
    if name is None:
        raise ConfigError("missing; give package.module:callable", setting=setting)
    return network_builder(setting, name, settings)


def read_preprocess(text: str | None) -> Preprocess:
    """Read the preprocessing rules that *text* names: `timm:NAME`, `torchvision:WEIGHTS` or a JSON file.

    Raises `ConfigError` for an unknown name and for a file that is not a `Preprocess`.
    """
    if not text:
        raise ConfigError(f"missing; give {EXAMPLE}", setting="preprocess")
    kind, _, name = text.partition(":")
    if kind == "timm":
        config = import_timm(name).get_pretrained_cfg(name)
        if config is None:
            raise ConfigError(
                "timm publishes no preprocessing for it; give FILE.json", setting="preprocess", value=text
            )
        return Preprocess.from_timm(config.to_dict())
    if kind == "torchvision":
        try:
            weights = importlib.import_module("torchvision.models").get_weight(name)
        except (ValueError, AttributeError, KeyError) as error:
            raise ConfigError(
                f"torchvision has no weights {name}; write for example "
                "torchvision:ResNet18_Weights.IMAGENET1K_V1",
                setting="preprocess",
                value=text,
            ) from error
        return Preprocess.from_torchvision(weights.transforms())
    try:
        return Preprocess.model_validate(json.loads(Path(text).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        reason = first_problem(error) if isinstance(error, pydantic.ValidationError) else str(error)
        raise ConfigError(
            f"cannot be read ({reason}); give {EXAMPLE}", setting="preprocess", value=text
        ) from error


def _index_or_name(logits: str | None) -> str | int | None:
    try:
        return logits if logits is None else int(logits)
    except ValueError:
        return logits
