"""Export a network of the user from a weight file: `sopdeploy export --network` and `sopdeploy inspect`."""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from torch import nn

from sopdeploy.backbones.timm_backbone import import_timm
from sopdeploy.config import first_problem
from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.import_weights import read_class_names
from sopdeploy_export.pipeline import Exported, ExportOptions
from sopdeploy_export.user_network.builder import network_builder
from sopdeploy_export.user_network.export_network import export_network, unused_modules
from sopdeploy_export.user_network.weights import LoadedWeights, load_weights

EXAMPLE = "timm:resnet18, torchvision:ResNet18_Weights.IMAGENET1K_V1 or FILE.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSource:
    """A network built by the user's code, and its weight file; fields are named after options of `export`."""

    weights: Path
    network: str
    settings: Sequence[str] = ()
    preprocess: str = ""
    table: str | None = None
    plain: str | None = None
    plain_settings: Sequence[str] = ()
    training_only: Sequence[str] = ()
    labels: Path | None = None
    logits: str | None = None
    allow_constants: bool = False
    name: str | None = None

    def load(self) -> tuple[nn.Module, LoadedWeights]:
        """Build the network and load its weights."""
        network = network_builder("--network", self.network, self.settings)()
        return network, load_weights(network, self.weights, self.table)


def export_weights(
    source: NetworkSource, destination: Path, options: ExportOptions, on_step: Callable[[str], None]
) -> Exported:
    """Export the network of *source*; after a `SopdeployError`, *destination* contains nothing new."""
    if source.labels is None:
        raise ConfigError(
            "--labels: missing; give a file with one class name per line, in the order of the logits"
        )
    if source.plain_settings and source.plain is None:
        raise ConfigError("--plain-set: only with --plain")
    labels, preprocess = read_class_names(source.labels), read_preprocess(source.preprocess)
    plain = None
    if source.plain is not None:
        plain = network_builder("--plain", source.plain, source.plain_settings)
    on_step("building the network")
    network, loaded = source.load()
    return export_network(
        network,
        plain=plain,
        training_only=source.training_only,
        labels=labels,
        preprocess=preprocess,
        destination=destination,
        name=source.name or source.network.rpartition(":")[2].rpartition(".")[2],
        logits=_index_or_name(source.logits),
        allow_constants=source.allow_constants,
        options=options,
        config={
            "network": source.network,
            "settings": list(source.settings),
            "plain": source.plain,
            "plain_settings": list(source.plain_settings),
            "training_only": list(source.training_only),
            "logits": source.logits,
            "allow_constants": source.allow_constants,
            "table": loaded.table,
            "prefixes_removed": list(loaded.removed),
        },
        sha256=loaded.sha256,
        on_step=on_step,
    )


def inspect(source: NetworkSource) -> dict[str, Any]:
    """List the parts of the network of *source* that its output does not depend on; writes nothing."""
    network, loaded = source.load()
    unused = unused_modules(network, read_preprocess(source.preprocess), logits=_index_or_name(source.logits))
    return {
        "network": source.network,
        "tensors": len(network.state_dict()),
        "table": loaded.table,
        "prefixes_removed": list(loaded.removed),
        "unused": list(unused),
    }


def read_preprocess(text: str) -> Preprocess:
    """Read the preprocessing rules that *text* names: `timm:NAME`, `torchvision:WEIGHTS` or a JSON file.

    Raises `ConfigError` for an unknown name and for a file that is not a `Preprocess`.
    """
    kind, _, name = text.partition(":")
    if not text:
        raise ConfigError(f"--preprocess: missing; give {EXAMPLE}")
    if kind == "timm":
        config = import_timm(name).get_pretrained_cfg(name)
        if config is None:
            raise ConfigError(f"--preprocess {text}: timm publishes no preprocessing for it; give FILE.json")
        return Preprocess.from_timm(config.to_dict())
    if kind == "torchvision":
        try:
            weights = importlib.import_module("torchvision.models").get_weight(name)
        except (ValueError, AttributeError, KeyError) as error:
            raise ConfigError(
                f"--preprocess {text}: torchvision has no weights {name}; write for example "
                "torchvision:ResNet18_Weights.IMAGENET1K_V1"
            ) from error
        return Preprocess.from_torchvision(weights.transforms())
    try:
        return Preprocess.model_validate(json.loads(Path(text).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        reason = first_problem(error) if isinstance(error, pydantic.ValidationError) else str(error)
        raise ConfigError(f"--preprocess {text}: cannot be read ({reason}); give {EXAMPLE}") from error


def _index_or_name(logits: str | None) -> str | int | None:
    try:
        return logits if logits is None else int(logits)
    except ValueError:
        return logits
