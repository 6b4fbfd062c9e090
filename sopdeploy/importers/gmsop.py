"""Importer of GM-SOP's networks for 64-pixel images: GAP, SR-SOP, GM-GAP and GM-SOP on ResNet and WRN.

Paper: Wang et al., GM-SOP (NeurIPS 2018). The files are MatConvNet networks (DagNN): `net.params` has the
arrays by name, `net.layers` the settings of each layer, `net.meta` the color that is subtracted from images.
Training files also hold `state` and `stats`, which are not read.

The released networks take pixels of 0 to 255 minus the mean. `input_scaling="raw"` divides these by
60 before conv1, so the weights of conv1 are multiplied by 60. Triangle vectors are stored column by column;
each tensor with such an axis is made row-wise.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sopdeploy.backbones.resnet import LOW_RESOLUTION_WIDTHS as WIDTHS
from sopdeploy.backbones.resnet import RAW_SCALE
from sopdeploy.errors import WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.conversion import ConvertedWeights, Layer, WeightFile, row_wise_order, triangle_side
from sopdeploy.models.registry import CATALOG
from sopdeploy.user_files import check_tensors

_STAGES = (2, 3, 4, 5)
LETTERS = "abcdefgh"  # of the convolutions of a component
SIDE = 64
EPS = 1e-5  # of every batch norm of sopdeploy
MATRIX_ROOT = "OBJ_ConvNet_Cov_Sqrtm"
PRENORMS = {"OBJ_ConvNet_Cov_TraceNorm": "trace", "OBJ_ConvNet_Cov_FroNorm": "frobenius"}
LAYER_KINDS = {
    *("Conv", "BatchNorm", "ReLU", "Sum", "Pooling", "DropOut", "Loss"),
    *("H_x", "gating", "CM_out", "Balance_loss"),
    *(MATRIX_ROOT, *PRENORMS, "OBJ_ConvNet_COV_Pool", "OBJ_ConvNet_COV_ScaleTr", "OBJ_ConvNet_COV_ScaleFro"),
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
    config = read_settings(file)
    gated = "gating_w" in file.tensors
    component = "sop" if "iterations" in config else "gap"
    blocks = sum(name.startswith("conv2_") and name.endswith("a_f") for name in file.tensors)
    widen = len(conv_kernel(file, "conv2_1a_f")) // WIDTHS[0]
    config |= {
        "component": component,
        "blocks_per_stage": blocks,
        "widen": widen,
        "components": 1,
        "input_scaling": "raw",
    }
    if gated:
        config |= _gate_config(file)
    width = config["component_widths"][-1] if config.get("component_widths") else WIDTHS[-1] * widen
    tensors = _backbone_and_head(file, blocks, width if component == "sop" else None)
    if gated:
        tensors |= _gate(file, config, component == "sop") | _components(file, config)
    tensors |= {name: tensor for name, tensor in file.tensors.items() if name not in file.used}
    return ConvertedWeights(
        project="GM-SOP",
        description=f"{_TITLES[gated, component]}, {blocks} blocks per stage, {widen} times as wide",
        model=_catalog_name(gated, component, blocks, widen),
        tensors=tensors,
        num_classes=len(pointwise_kernel(file, "prediction_f")),
        preprocess=_preprocess(file),
        detected=config,
        imagenet=False,
        notes=NOTES,
    )


def _catalog_name(gated: bool, component: str, blocks: int, widen: int) -> str | None:
    """Name the network of the catalog with this gate, component, blocks per stage and widening, if any."""
    backbone = {2: "resnet18", 6: "resnet50"}.get(blocks, f"wrn36-{widen}")
    plain = backbone if backbone.startswith("wrn") else f"{backbone}-64px"
    single = {"gap": plain, "sop": f"srsop-{backbone}"}
    name = f"gm{component}-16-8-{backbone}" if gated else single[component]
    return name if name in CATALOG else None


def _preprocess(file: WeightFile) -> Preprocess:
    """Build the preprocessing: pixels of 0 to 255 minus a color, or the mean color of an image (H, W, 3)."""
    color, sides = (np.ravel(file.normalization.get(key, ())) for key in ("averageImage", "imageSize"))
    if not color.size:
        raise WeightsError(f"{file.path}: has no meta.normalization.averageImage; save the network with meta")
    side = float(sides[0]) if len(sides) else SIDE
    mean = tuple(color.reshape(-1, 3).mean(axis=0) / 255.0)
    return Preprocess.model_validate({"resize": side, "crop": side, "mean": mean, "std": (1 / 255,) * 3})


def _gate_config(file: WeightFile) -> dict[str, Any]:
    """Read the options of the gate and of the mixture."""
    dropouts = [name for name, layer in file.layers.items() if layer.kind == "DropOut"]
    components = [name for letter in LETTERS if (name := f"CM_1_{letter}_f") in file.tensors]
    gates = [name for layer in range(1, 9) if (name := f"gating{layer}_f") in file.tensors]
    return {
        "components": file.tensor("gating_w").shape[1],
        "chosen": int(layer_number(file, "gating", "topk")),
        "component_widths": [len(conv_kernel(file, name)) for name in components],
        "gate_widths": [len(conv_kernel(file, name)) for name in gates],
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
        found |= batch_norm(file, f"{source}_bn", name)
    if "fusion_bn_bn_w" in file.tensors:
        found |= batch_norm(file, "fusion_bn_bn", "head.bn", order)
    return found | {"head.fc.weight": reorder(prediction, order, 1), "head.fc.bias": bias(file, "prediction")}


def _gate(file: WeightFile, config: dict[str, Any], second_order: bool) -> dict[str, Tensor]:
    """Convert the gate; with *second_order* components it reads a triangle of the last of its widths."""
    found: dict[str, Tensor] = {}
    for layer in range(len(config["gate_widths"])):
        source, name = f"gating{layer + 1}", f"gate.feature.{layer}"
        found[f"{name}.0.weight"] = conv_kernel(file, f"{source}_f")
        if config["gate_norm"]:
            found |= batch_norm(file, f"{source}_bn", f"{name}.1")
    width = config["gate_widths"][-1] if second_order and config["gate_widths"] else None
    for source, name in (("gating_w", "gate.weight"), ("gating_noise_w", "gate.noise.weight")):
        weight = file.tensor(source).T
        found[name] = reorder(weight, _triangle_order(width, weight), 1)
    return found


def _components(file: WeightFile, config: dict[str, Any]) -> dict[str, Tensor]:
    """Convert the convolutions of the components; the tensors of all components are joined."""
    found: dict[str, Tensor] = {}
    for step, letter in enumerate(LETTERS[: len(config["component_widths"])]):
        sources = [f"CM_{number}_{letter}" for number in range(1, config["components"] + 1)]
        kernels = [pointwise_kernel(file, f"{source}_f") for source in sources]
        found[f"mixture.weights.{step}"] = torch.stack(kernels)
    return found


def read_dagnn(path: Path, digest: str, variables: dict[str, Any]) -> WeightFile:
    """Read the network in the *variables* of a MATLAB file with sha256 *digest*; raises `WeightsError`."""
    net = variables.get("net", variables)
    try:
        tensors = {record["name"]: _tensor(record["value"]) for record in _records(net["params"])}
        return WeightFile(
            path=path,
            sha256=digest,
            layers={
                record["name"]: Layer(record["type"].removeprefix("dagnn."), record.get("block"))
                for record in _records(net["layers"])
            },
            tensors=check_tensors(path, tensors),
            normalization=net.get("meta", {}).get("normalization", {}),
        )
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path}: holds no MatConvNet network (`net` with `params` and `layers`, on the CPU); save the "
            "whole network"
        ) from error


def _records(value: Any) -> list[Any]:
    """Return a struct array as a list; MATLAB stores an array of one struct as that struct."""
    return value if isinstance(value, list) else [value]


def _tensor(value: Any) -> Tensor:
    return torch.from_numpy(np.asarray(value).astype(np.float64, casting="same_kind"))


def conv_kernel(file: WeightFile, name: str) -> Tensor:
    """Get convolution *name* as (out, in, height, width); in the file, a 1x1 kernel has two axes."""
    kernel = file.tensor(name)
    return (kernel[None, None] if kernel.dim() == 2 else kernel).permute(3, 2, 0, 1)


def pointwise_kernel(file: WeightFile, name: str) -> Tensor:
    """Get 1x1 convolution *name* as a matrix (out, in)."""
    return conv_kernel(file, name).flatten(1)


def bias(file: WeightFile, source: str) -> Tensor:
    """Get the bias (out,) of the layer *source*."""
    return file.tensor(f"{source}_b").reshape(-1)


def batch_norm(file: WeightFile, source: str, name: str, order: Tensor | None = None) -> dict[str, Tensor]:
    """Convert the batch norm *source* to *name*, with its channels permuted by *order*.

    MatConvNet stores sqrt(variance + eps). Where it is below sqrt(eps), the variance is 0 and the weight of
    the channel is scaled instead.
    """
    mean, deviation = file.tensor(f"{source}_m").unbind(dim=1)
    variance = (deviation.square() - EPS).clamp_min(0.0)
    factor = torch.where(variance > 0, torch.ones_like(deviation), (variance + EPS).sqrt() / deviation)
    parts = {
        "weight": file.tensor(f"{source}_w").reshape(-1) * factor,
        "bias": bias(file, source),
        "running_mean": mean,
        "running_var": variance,
    }
    return {f"{name}.{part}": reorder(values, order, 0) for part, values in parts.items()}


def reorder(values: Tensor, order: Tensor | None, axis: int) -> Tensor:
    """Permute *axis* of *values* by *order* from column-wise to row-wise triangles."""
    if order is None or values.shape[axis] != len(order):  # `fit_tensors` reports a wrong shape
        return values
    return values.index_select(axis, order)


def layer_number(file: WeightFile, name: str, key: str) -> float:
    """Get the number *key* of the layer *name*; several values, such as strides, must be equal."""
    (value,) = set(np.ravel(file.layers[name].block[key]).tolist())
    return float(value)


def read_settings(file: WeightFile) -> dict[str, Any]:
    """Read the stride of the fifth stage, and iterations and pre-normalization of the matrix square roots.

    Raises `WeightsError` if a layer is not supported.
    """
    for name, layer in file.layers.items():
        if layer.kind not in LAYER_KINDS:
            raise WeightsError(f"{file.path}: layer {name} has the type {layer.kind}, not supported")
    settings: dict[str, Any] = {"conv5_stride": int(layer_number(file, "conv5_1a_conv", "stride"))}
    roots = [name for name, layer in file.layers.items() if layer.kind == MATRIX_ROOT]
    if roots:
        (iterations,) = {int(layer_number(file, name, "iterNum")) for name in roots}
        (norm,) = {PRENORMS[layer.kind] for layer in file.layers.values() if layer.kind in PRENORMS}
        settings |= {"iterations": iterations, "prenorm": norm}
    return settings
