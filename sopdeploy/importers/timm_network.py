"""Importers of timm's networks in the catalog (`timm:NAME`) and of EfficientNet-Lite, and the preprocessing
that timm's hub publishes.

Files of timm's hub lie next to a `config.json` with their preprocessing. Without it, the preprocessing of
timm's default weights is used.
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sopdeploy.backbones.timm_backbone import import_timm
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.source import ConvertedWeights, WeightFile, rename_tensors

PREFIX = "timm:"
HUB_CONFIG = "config.json"
FROM_HUB_CONFIG = f"preprocessing from {HUB_CONFIG} next to the file"
LITE = {  # preprocessing of EfficientNet-Lite, which needs no timm
    model: Preprocess(resize=resize, crop=crop, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    for model, resize, crop in (("efficientnet-lite0", 256, 224), ("efficientnet-lite2", 292, 260))
}
NO_HUB_CONFIG = f"no {HUB_CONFIG} next to the file: preprocessing of timm's default weights"


def convert_timm(file: WeightFile, model: str) -> ConvertedWeights | None:
    """Convert the weights of a timm network, whose names stay; None if *model* is not a `timm:NAME`."""
    if not model.startswith(PREFIX) or file.layers:
        return None
    backbone = model.removeprefix(PREFIX)
    import_timm(backbone)
    pretrained = importlib.import_module("timm").get_pretrained_cfg(backbone).to_dict()
    config = read_hub_config(file.path)
    classifier = pretrained.get("classifier") or ""
    # A distilled network has two classifiers of the same classes; DINOv2's and SigLIP's files have none.
    weight = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
    return ConvertedWeights(
        description=f"timm's {backbone}",
        model=model,
        tensors=rename_tensors(file),
        num_classes=len(file.tensor(weight)) if weight in file.tensors else 0,
        preprocess=Preprocess.from_timm({**pretrained, **config}),
        labels="imagenet",
        notes=(FROM_HUB_CONFIG if config else NO_HUB_CONFIG,),
    )


def convert_efficientnet_lite(file: WeightFile, model: str) -> ConvertedWeights | None:
    """Convert an EfficientNet-Lite with timm's names; None for other files and other networks."""
    if model not in LITE or not {"conv_stem.weight", "blocks.0.0.conv_dw.weight"} <= file.tensors.keys():
        return None
    config = read_hub_config(file.path)
    return ConvertedWeights(
        description=f"timm's tf_{model.replace('-', '_')}",
        model=model,
        tensors=rename_tensors(file),
        num_classes=len(file.tensor("classifier.weight")),
        preprocess=Preprocess.from_timm(config) if config else LITE[model],
        required={"pooling.kind": "gap"},
        labels="imagenet",
        notes=(FROM_HUB_CONFIG,) if config else (),
    )


def read_hub_config(weights: Path) -> Mapping[str, Any]:
    """Read `pretrained_cfg` of the config.json next to *weights*; empty if there is none."""
    try:
        content = json.loads(weights.with_name(HUB_CONFIG).read_bytes())
    except (OSError, ValueError):
        return {}
    config = content.get("pretrained_cfg") if isinstance(content, dict) else None
    return config if isinstance(config, dict) else {}
