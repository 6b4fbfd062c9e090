"""Importer of GM-SOP's networks for 64-pixel images: GAP, SR-SOP, GM-GAP and GM-SOP on ResNet and WRN.

Paper: Wang et al., GM-SOP (NeurIPS 2018). The files are MatConvNet networks, whose layers contain the
settings. The released networks take pixels of 0 to 255 minus the mean. `input_scaling="raw"` divides these by
60 before conv1, so the weights of conv1 are multiplied by 60. Triangle vectors are stored column by column;
each tensor with such an axis is made row-wise.
"""

from typing import Any

import torch
from torch import Tensor

from sopdeploy.backbones.resnet import LOW_RESOLUTION_WIDTHS as WIDTHS
from sopdeploy.backbones.resnet import RAW_SCALE
from sopdeploy.errors import WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.conversion import ConvertedWeights, WeightFile, row_wise_order, triangle_side
from sopdeploy.importers.matconvnet import (
    batch_norm,
    bias,
    conv_kernel,
    layer_number,
    pointwise_kernel,
    read_settings,
    reorder,
)

_STAGES = (2, 3, 4, 5)
LETTERS = "abcdefgh"  # of the convolutions of a component
SIDE = 64
_MODELS = {  # by (with a gate, component, blocks per stage, widening)
    (True, "gap", 2, 1): "gmgap-16-8-resnet18",
    (True, "sop", 2, 1): "gmsop-16-8-resnet18",
    (True, "sop", 6, 1): "gmsop-16-8-resnet50",
    (True, "gap", 4, 2): "gmgap-16-8-wrn36-2",
    (True, "sop", 4, 2): "gmsop-16-8-wrn36-2",
    (False, "gap", 2, 1): "resnet18-64px",
    (False, "gap", 6, 1): "resnet50-64px",
    (False, "sop", 2, 1): "srsop-resnet18",
    **{(False, "gap", 4, widen): f"wrn36-{widen}" for widen in (1, 2, 5)},
}
_TITLES = {(True, "gap"): "GM-GAP", (True, "sop"): "GM-SOP", (False, "gap"): "GAP", (False, "sop"): "SR-SOP"}
NOTES = (
    "classes are numbered: downsampled ImageNet has a class order of its own; give --labels",
    "height and width of the training images may have been swapped: compare with the published error",
)


def convert_gmsop(file: WeightFile, _model: str) -> ConvertedWeights | None:
    """Convert a network of GM-SOP, with the settings in its layers; None for other files."""
    if not file.layers or not {"conv1_f", "conv2_1a_f", "prediction_f"} <= file.tensors.keys():
        return None
    settings = read_settings(file)
    gated = "gating_w" in file.tensors
    component = "sop" if "iterations" in settings else "gap"
    blocks = sum(name.startswith("conv2_") and name.endswith("a_f") for name in file.tensors)
    widen = len(conv_kernel(file, "conv2_1a_f")) // WIDTHS[0]
    required = {"component": component, "blocks_per_stage": blocks, "widen": widen, "components": 1}
    config = settings | {
        "blocks_per_stage": blocks,
        "widen": widen,
        "project_first_stage": "conv2_1_adapt_conv_f" in file.tensors,
        "input_scaling": "raw",
    }
    if gated:
        config |= _gate_config(file)
        required |= {key: config[key] for key in ("components", "chosen")}
    width = config["component_widths"][-1] if config.get("component_widths") else WIDTHS[-1] * widen
    tensors = _backbone_and_head(file, blocks, width if component == "sop" else None)
    if gated:
        tensors |= _gate(file, config, component == "sop")
    tensors |= {name: tensor for name, tensor in file.tensors.items() if name not in file.used}
    return ConvertedWeights(
        description=f"{_TITLES[gated, component]}, {blocks} blocks per stage, {widen} times as wide",
        model=_MODELS.get((gated, component, blocks, widen)),
        tensors=tensors,
        num_classes=len(pointwise_kernel(file, "prediction_f")),
        preprocess=_preprocess(file),
        required=required,
        detected=config,
        labels=None,
        notes=NOTES,
    )


def _preprocess(file: WeightFile) -> Preprocess:
    """Build the preprocessing: pixels of 0 to 255 minus the mean color, not divided."""
    if file.average_color is None:
        raise WeightsError(
            f"{file.path}: meta.normalization.averageImage is not a color; save the network with meta"
        )
    side = SIDE if file.image_size is None else file.image_size
    mean = tuple(channel / 255.0 for channel in file.average_color)
    return Preprocess.model_validate({"resize": side, "crop": side, "mean": mean, "std": (1 / 255,) * 3})


def _component_kernels(file: WeightFile, component: int) -> list[str]:
    """List the names of the convolutions of component 1, 2 and so on."""
    return [name for letter in LETTERS if (name := f"CM_{component}_{letter}_f") in file.tensors]


def _gate_config(file: WeightFile) -> dict[str, Any]:
    """Read the options of the gate and of the mixture."""
    dropouts = [name for name, layer in file.layers.items() if layer.kind == "DropOut"]
    gate_layers = sum(name.startswith("gating") and name[6:-2].isdigit() for name in file.tensors)
    norm = "CM_1_a_bn_w" in file.tensors
    return {
        "components": file.tensor("gating_w").shape[1],
        "chosen": int(layer_number(file, "gating", "topk")),
        "component_widths": [len(conv_kernel(file, name)) for name in _component_kernels(file, 1)],
        "component_bias": "CM_1_a_b" in file.tensors,
        "component_norm": norm,
        "evaluation": "dense" if norm else "routed",
        "gate_widths": [len(conv_kernel(file, f"gating{layer}_f")) for layer in range(1, gate_layers + 1)],
        "gate_norm": "gating1_bn_w" in file.tensors,
        "dropout": layer_number(file, dropouts[0], "rate") if dropouts else 0.0,
        "balance_weight": layer_number(file, "Balance_loss", "loss_weight"),
        "noise_per": "image",
        "fusion_norm": "fusion_bn_bn_w" in file.tensors,
    }


def _triangle_order(width: int | None, vectors: Tensor) -> Tensor | None:
    """Compute the row-wise order of the columns of *vectors* if they are triangles of *width* channels."""
    return None if width is None or triangle_side(vectors.shape[1]) != width else row_wise_order(width)


def _backbone_and_head(file: WeightFile, blocks: int, width: int | None) -> dict[str, Tensor]:
    """Convert the ResNet and the classifier of triangles with *width* channels; None stands for averages."""
    prediction = pointwise_kernel(file, "prediction_f")
    order = _triangle_order(width, prediction)
    norms, found = {"conv1": "bn1"}, {"conv1.weight": conv_kernel(file, "conv1_f") / RAW_SCALE}
    found["conv1.bias"] = bias(file, "conv1")
    for stage in _STAGES:
        for block in range(blocks):
            source, name = f"conv{stage}_{block + 1}", f"layer{stage - 1}.{block}"
            layers = {"a": ("conv1", "bn1"), "b": ("conv2", "bn2")}
            if f"{source}_adapt_conv_f" in file.tensors:
                layers["_adapt_conv"] = ("downsample.0", "downsample.1")
            for layer, (conv, norm) in layers.items():
                found[f"{name}.{conv}.weight"] = conv_kernel(file, f"{source}{layer}_f")
                norms[f"{source}{layer}"] = f"{name}.{norm}"
    for source, name in norms.items():
        found |= _named(name, batch_norm(file, f"{source}_bn"))
    if "fusion_bn_bn_w" in file.tensors:
        found |= _named("head.bn", batch_norm(file, "fusion_bn_bn", order))
    return found | {"head.fc.weight": reorder(prediction, order, 1), "head.fc.bias": bias(file, "prediction")}


def _gate(file: WeightFile, config: dict[str, Any], second_order: bool) -> dict[str, Tensor]:
    """Convert the gate and the components; the tensors of all components are joined."""
    found: dict[str, Tensor] = {}
    for layer in range(len(config["gate_widths"])):
        source, name = f"gating{layer + 1}", f"gate.feature.{layer}"
        found[f"{name}.0.weight"] = conv_kernel(file, f"{source}_f")
        if config["gate_norm"]:
            found |= _named(f"{name}.1", batch_norm(file, f"{source}_bn"))
    width = config["gate_widths"][-1] if second_order and config["gate_widths"] else None
    for source, name in (("gating_w", "gate.weight"), ("gating_noise_w", "gate.noise.weight")):
        weight = file.tensor(source).T
        found[name] = reorder(weight, _triangle_order(width, weight), 1)
    components = (_component_kernels(file, number) for number in range(1, config["components"] + 1))
    for step, kernels in enumerate(zip(*components, strict=True)):
        found[f"mixture.weights.{step}"] = torch.stack([pointwise_kernel(file, name) for name in kernels])
        sources = [name.removesuffix("_f") for name in kernels]
        if config["component_bias"]:
            found[f"mixture.biases.{step}"] = torch.cat([bias(file, source) for source in sources])
        if config["component_norm"]:
            norms = [batch_norm(file, f"{source}_bn") for source in sources]
            joined = {name: torch.cat([norm[name] for norm in norms]) for name in norms[0]}
            found |= _named(f"mixture.norms.{step}", joined)
    return found


def _named(layer: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{layer}.{name}": tensor for name, tensor in tensors.items()}
