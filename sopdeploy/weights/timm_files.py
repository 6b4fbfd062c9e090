"""Weight files of timm's networks: `timm:NAME`, and EfficientNet-Lite with timm's names or its own.

Files of timm's hub lie next to a `config.json` with their preprocessing; without it, timm's
default is used.
"""

import importlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sopdeploy.base.config import parse_json
from sopdeploy.base.files import MAX_TEXT_BYTES, read_file
from sopdeploy.errors import WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy.weights.conversion import ConvertedWeights, WeightFile

TIMM_PREFIX = "timm:"
HUB_CONFIG = "config.json"
FROM_HUB_CONFIG = f"preprocessing from {HUB_CONFIG} next to the file"
NO_HUB_CONFIG = f"no {HUB_CONFIG} next to the file: preprocessing of timm's default weights"
# Preprocessing of EfficientNet-Lite, without the import of timm, which takes a second
LITE = {
    model: Preprocess(
        resize=resize, crop=crop, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    for model, resize, crop in (
        ("efficientnet-lite0", 256, 224),
        ("efficientnet-lite2", 292, 260),
    )
}


def convert_timm(file: WeightFile, model: str) -> ConvertedWeights | None:
    """Convert the weights of a timm network, whose names stay; None if *model* is not a `timm:NAME`.

    A file with the names of EfficientNet-PyTorch has a converter of its own. Raises `WeightsError`
    if the tensors are those of another network.
    """
    if not model.startswith(TIMM_PREFIX) or ORIGINAL_STEM in file.tensors:
        return None
    from sopdeploy.models.timm_networks import import_timm  # noqa: PLC0415  # imports blocks of networks

    backbone = model.removeprefix(TIMM_PREFIX)
    timm = import_timm(backbone)
    if not _has_tensors_of(model, file):
        refuse_other_network(file, model)

    pretrained = timm.get_pretrained_cfg(backbone).to_dict()
    config = read_hub_config(file.path)
    classifier = pretrained.get("classifier")
    # A distilled network has two classifiers of the same classes.
    if isinstance(classifier, tuple):
        classifier = classifier[0]

    # DINOv2's and SigLIP's networks have no classifier, and others may be stored without
    # theirs.
    has_classifier = classifier is not None and f"{classifier}.weight" in file.tensors

    return ConvertedWeights(
        project="timm",
        description=f"timm's {backbone}",
        model=model,
        tensors=file.tensors,
        num_classes=len(file.tensor(f"{classifier}.weight")) if has_classifier else 0,
        preprocess=Preprocess.from_timm({**pretrained, **config}),
        notes=(FROM_HUB_CONFIG if config else NO_HUB_CONFIG,),
    )


def convert_efficientnet_lite(file: WeightFile, model: str) -> ConvertedWeights | None:
    """Convert the weights of the EfficientNet-Lite *model*; None for other files and other networks.

    *model* can also have timm's name, `timm:tf_efficientnet_lite0`, or extend the network:
    `gsop-net1-efficientnet-lite0`.
    """
    name = model.replace("_", "-").partition(".")[0]
    network = next((lite for lite in LITE if name.endswith(lite)), None)
    if network is None:
        return None

    # Whether the names are those of EfficientNet-PyTorch, which other projects have kept.
    is_original = ORIGINAL_STEM in file.tensors
    named = replace(file, tensors=_name_as_timm(file, model)) if is_original else file
    if not _has_tensors_of(model, named):
        return None

    config = read_hub_config(file.path)
    project = "timm"
    description = f"timm's tf_{network.replace('-', '_')}"
    if is_original:
        project = "EfficientNet-Lite"
        description = project

    return ConvertedWeights(
        project=project,
        description=description,
        model=model,
        tensors=named.tensors,
        num_classes=len(named.tensor("classifier.weight")),
        preprocess=Preprocess.from_timm(config) if config else LITE[network],
        detected={"pooling.kind": "gap"},
        notes=(FROM_HUB_CONFIG,) if config else (),
    )


ORIGINAL_STEM = "_conv_stem.weight"  # in every file with the names of EfficientNet-PyTorch
ORIGINAL_PARTS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# Layers of a block in their order; a block of the first stage has no expansion.
ORIGINAL_LAYERS = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")
EXPANDED = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
NOT_EXPANDED = ("", "", "conv_dw", "bn1", "conv_pw", "bn2")


def _name_as_timm(file: WeightFile, model: str) -> dict[str, Tensor]:
    """Give the tensors of EfficientNet-PyTorch's *file* timm's names.

    The file numbers the blocks of all stages in one sequence.
    """
    # timm's blocks in order, such as `blocks.1.0`, each once.
    names = _learned_shapes(model)
    block_names = [
        ".".join(name.split(".")[:3]) for name in names if name.startswith("blocks.")
    ]
    blocks = list(dict.fromkeys(block_names))

    # timm's name of each layer, by its name in EfficientNet-PyTorch; for each block.
    layer_names = []
    for block in blocks:
        is_expanded = f"{block}.conv_pwl.weight" in names
        timm_layers = EXPANDED if is_expanded else NOT_EXPANDED
        layer_names.append(dict(zip(ORIGINAL_LAYERS, timm_layers, strict=True)))

    # `_blocks.1._bn0.weight` becomes `blocks.1.0.bn1.weight`, and `_fc.bias` `classifier.bias`.
    renamed = {}
    for name, tensor in file.tensors.items():
        part, _, rest = name.partition(".")
        text, _, inside = rest.partition(".")
        number = int(text) if part == "_blocks" and text.isdecimal() else len(blocks)
        if number < len(blocks):
            layer, _, end = inside.partition(".")
            renamed[f"{blocks[number]}.{layer_names[number].get(layer, layer)}.{end}"] = tensor
        else:
            renamed[f"{ORIGINAL_PARTS.get(part, part)}.{rest}"] = tensor

    return renamed


def find_network(file: WeightFile) -> str | None:
    """Find the network of timm that has the tensors of *file*, as `timm:NAME`.

    The architecture is that in the config.json next to the file, or else in the file, or else the
    name of the file. NAME is the longest of timm's names that it contains. None if it contains
    none, or if the tensors differ.
    """
    text = str(_read_hub_json(file.path).get("architecture") or file.arch or file.path.name)
    names = [name for name in importlib.import_module("timm").list_models() if name in text]
    if not names:
        return None
    model = TIMM_PREFIX + max(names, key=len)
    return model if _has_tensors_of(model, file) else None


def refuse_other_network(file: WeightFile, model: str) -> None:
    """Raise `WeightsError` if another network of timm has the tensors of *file*; the error names it."""
    if network := find_network(file):
        raise WeightsError(
            f"{file.path}: does not fit {model}; it has the tensors of "
            f"{network}, so name that network"
        )


def _has_tensors_of(model: str, file: WeightFile) -> bool:
    """Check that *file* has every tensor that *model* learns in front of its classifier."""
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    return all(shapes.get(name) == shape for name, shape in _learned_shapes(model).items())


@cache
def _learned_shapes(model: str) -> Mapping[str, torch.Size]:
    """Map the tensors that *model* learns in front of its classifier to their shapes; builds it once."""
    with torch.device("meta"):
        if model.startswith(TIMM_PREFIX):
            timm = importlib.import_module("timm")
            network = timm.create_model(model.removeprefix(TIMM_PREFIX), num_classes=0)
        else:
            network = create_model(model)
            network.remove_classifier()

    return {name: tensor.shape for name, tensor in network.named_parameters()}


def read_hub_config(weights: Path) -> Mapping[str, Any]:
    """Read `pretrained_cfg` of the config.json next to *weights*; empty if there is none."""
    config = _read_hub_json(weights).get("pretrained_cfg")
    return config if isinstance(config, dict) else {}


def _read_hub_json(weights: Path) -> Mapping[str, Any]:
    try:
        content = parse_json(read_file(weights.with_name(HUB_CONFIG), MAX_TEXT_BYTES))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
