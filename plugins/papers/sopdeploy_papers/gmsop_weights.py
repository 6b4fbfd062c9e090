"""Importer of GM-SOP's networks for 64-pixel images: GAP, SR-SOP, GM-GAP and GM-SOP on ResNet and WRN.

Paper: Wang et al., GM-SOP (NeurIPS 2018). The files are MatConvNet networks (DagNN):
`net.params` has the arrays by name, `net.layers` the settings of each layer, `net.meta` the
color that is subtracted from images.

The released networks take pixels of 0 to 255 minus the mean. Here they are also divided by 60,
so the weights of conv1 are multiplied by 60. Triangle vectors are stored column by column and
are made row-wise.
"""

import os
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sopdeploy.base.config import FieldValues
from sopdeploy.base.environment import import_optional
from sopdeploy.base.files import BLOCK_BYTES
from sopdeploy.errors import WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.backbones.resnet import LOW_RESOLUTION_WIDTHS as WIDTHS
from sopdeploy.models.registry import CATALOG
from sopdeploy.weights.conversion import ConvertedWeights, Importer, WeightFile
from sopdeploy.weights.tensor_files import check_tensors

# A layer of the released networks, our name of it, and that of its batch norm; our numbers are
# one lower.
RENAMES = {
    r"conv1": ("conv1", "bn1"),
    r"conv(\d)_(\d+)a": ("layer{0}.{1}.conv1", "layer{0}.{1}.bn1"),
    r"conv(\d)_(\d+)b": ("layer{0}.{1}.conv2", "layer{0}.{1}.bn2"),
    r"conv(\d)_(\d+)_adapt_conv": ("layer{0}.{1}.downsample.0", "layer{0}.{1}.downsample.1"),
    r"gating(\d)": ("gate.feature.{0}.0", "gate.feature.{0}.1"),
    r"fusion_bn": ("head", "head.bn"),
    r"prediction": ("head.fc", "head.bn"),
}
PARAMETERS = {"w": "weight", "b": "bias"}  # of a batch norm; a convolution has `f` and `b`
GATE_WEIGHTS = {"gating_w": "gate.weight", "gating_noise_w": "gate.noise.weight"}
# First bytes of MATLAB's files, and of those of version 7.3
MATLAB = b"MATLAB "
HDF5 = b"MATLAB 7.3"
VARIABLES = ("net", "params", "layers", "meta")
# Of a MATLAB file: the size of its header, the tag and the type of a compressed element.
HEADER_BYTES = 128
TAG = struct.Struct("<II")
COMPRESSED = 15
# of all compressed elements
MAX_EXPANSION = 20
MIN_EXPANDED_BYTES = 1 << 26
SIDE = 64
# Standard deviation of pixels of 0 to 255 here; the released networks have 1
PIXEL_DEVIATION = 60.0
EPS = 1e-5  # of every batch norm of sopdeploy
MATRIX_ROOT = "OBJ_ConvNet_Cov_Sqrtm"
PRENORMS = {"OBJ_ConvNet_Cov_TraceNorm": "trace", "OBJ_ConvNet_Cov_FroNorm": "frobenius"}
LAYER_KINDS = {
    "Conv",
    "BatchNorm",
    "ReLU",
    "Sum",
    "Pooling",
    "DropOut",
    "Loss",
    "H_x",
    "gating",
    "CM_out",
    "Balance_loss",
    MATRIX_ROOT,
    *PRENORMS,
    "OBJ_ConvNet_COV_Pool",
    "OBJ_ConvNet_COV_ScaleTr",
    "OBJ_ConvNet_COV_ScaleFro",
}
_TITLES = {
    (True, "gap"): "GM-GAP",
    (True, "sop"): "GM-SOP",
    (False, "gap"): "GAP",
    (False, "sop"): "SR-SOP",
}
NOTES = (
    "classes are numbered: downsampled ImageNet has a class order of its own; give --labels",
    "height and width of the training images may have been swapped: compare with the published error",
)


class Layer(NamedTuple):
    """A layer of a MatConvNet network; `block` holds its settings, such as `iterNum` or `stride`."""

    kind: str
    block: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class DagNN(WeightFile):
    """A MatConvNet network; its tensors have MATLAB's axes.

    `layers` are its layers by name, `normalization` the size of images and the color that is
    subtracted from them.
    """

    layers: Mapping[str, Layer]
    normalization: Mapping[str, Any]


def convert_gmsop(file: WeightFile, _model: str) -> ConvertedWeights | None:
    """Convert a network of GM-SOP, with the settings in its layers; None for files of other formats."""
    if not isinstance(file, DagNN):
        return None
    tensors = _rename_tensors(file)

    # The size of the network from the names and shapes of its tensors.
    blocks = sum(
        name.startswith("layer1.") and name.endswith(".conv1.weight") for name in tensors
    )
    widen = len(tensors["layer1.0.conv1.weight"]) // WIDTHS[0]

    config = {
        **_read_pooling_options(file),
        "blocks_per_stage": blocks,
        "widen": widen,
        "components": 1,
        "conv5_stride": int(layer_number(file, "conv5_1a_conv", "stride")),
    }
    component = config["component"]

    # The options of a mixture, and the channels that it pools; or those of the last stage.
    is_gated = "gating_w" in file.tensors
    if is_gated:
        config |= _read_gate_options(file, tensors)
        config["component_widths"] = _stack_components(tensors, config["components"])
        pooled_channels = config["component_widths"][-1]
    else:
        pooled_channels = WIDTHS[-1] * widen

    # Layers after a covariance pooling read triangle vectors, which the file has column by
    # column.
    triangles: dict[str, int] = {}
    if component == "sop":  # the head and the gate read triangle vectors
        head_names = [
            name for name in tensors if name.startswith("head.") and name != "head.fc.bias"
        ]
        triangles = dict.fromkeys(head_names, pooled_channels)
        if is_gated:
            triangles |= dict.fromkeys(GATE_WEIGHTS.values(), config["gate_widths"][-1])

    return ConvertedWeights(
        project="GM-SOP",
        description=f"{_TITLES[is_gated, component]}, {blocks} blocks per stage, {widen} times as wide",
        model=_find_catalog_name(is_gated, component, blocks, widen),
        tensors=tensors,
        triangles=triangles,
        by_columns=True,
        num_classes=len(tensors["head.fc.weight"]),
        preprocess=_read_preprocess(file),
        detected=config,
        imagenet=False,
        notes=NOTES,
    )


def _stack_components(tensors: dict[str, Tensor], num_components: int) -> list[int]:
    """Stack the convolutions of the components of a mixture in *tensors*, in place; return their widths.

    In the file, they are separate layers: CM_2_a is the first convolution of component 2, CM_2_b
    its second one. Here, the first convolutions of all N components are one tensor (N, out, in),
    and so are the second ones.
    """
    widths: list[int] = []
    for letter in "abcdefgh":  # of up to 8 convolutions
        if f"CM_1_{letter}.weight" in tensors:
            numbers = range(1, num_components + 1)
            kernels = [tensors.pop(f"CM_{number}_{letter}.weight") for number in numbers]
            weight = torch.stack(kernels).flatten(start_dim=2)  # from (N, out, in, 1, 1)
            tensors[f"mixture.weights.{len(widths)}"] = weight
            widths.append(weight.shape[1])
    return widths


def _rename_tensors(file: DagNN) -> dict[str, Tensor]:
    """Give the arrays of *file* our axes and, where `RENAMES` has their layers, our names."""
    tensors: dict[str, Tensor] = {}

    for name, values in file.tensors.items():
        source, _, kind = name.rpartition("_")  # conv2_1a_bn_w: conv2_1a_bn and w
        is_norm = source.endswith("_bn")
        layer = source.removesuffix("_bn")
        norm = f"{layer}_bn"

        # Our name of the layer, and that of the batch norm after it.
        for pattern, our_names in RENAMES.items():
            if match := re.fullmatch(pattern, layer):
                # conv2_1a is of layer1.0
                numbers = [int(number) - 1 for number in match.groups()]
                layer, norm = (our_name.format(*numbers) for our_name in our_names)
                break

        # The kind of array decides its axes.
        if name in GATE_WEIGHTS:
            tensors[GATE_WEIGHTS[name]] = values.T
        elif is_norm and kind == "m":  # (C, 2): the mean and sqrt(variance + eps)
            mean, deviation = values.unbind(dim=1)
            # Rounding may make it negative
            variance = (deviation.square() - EPS).clamp_min(0.0)
            tensors |= {f"{norm}.running_mean": mean, f"{norm}.running_var": variance}
        # of a convolution: (height, width, in, out), or (in, out) for a kernel of 1x1
        elif kind == "f":
            kernel = values[None, None] if values.dim() == 2 else values
            tensors[f"{layer}.weight"] = kernel.permute(3, 2, 0, 1)
        elif kind in PARAMETERS:  # of a batch norm, or the bias of a convolution
            tensors[f"{norm if is_norm else layer}.{PARAMETERS[kind]}"] = values.reshape(-1)
        else:  # in no released file; it is reported as a tensor that the network does not have
            tensors[name] = values

    tensors["conv1.weight"] = tensors["conv1.weight"] * PIXEL_DEVIATION
    tensors["head.fc.weight"] = tensors["head.fc.weight"].flatten(start_dim=1)
    return tensors


def _find_catalog_name(is_gated: bool, component: str, blocks: int, widen: int) -> str | None:
    """Name the network of the catalog with this gate, component, blocks per stage and widening, if any."""
    backbone = {(2, 1): "resnet18", (6, 1): "resnet50", (4, 2): "wrn36-2"}.get((blocks, widen))
    if is_gated:
        name = f"gm{component}-16-8-{backbone}"  # 16 components, 8 of them kept
    elif component == "gap":
        # resnet18 is for 224 pixels
        name = "wrn36-2" if backbone == "wrn36-2" else f"{backbone}-64px"
    else:
        name = f"srsop-{backbone}"

    # no name with a backbone of None is in the catalog
    return name if name in CATALOG else None


def _read_preprocess(file: DagNN) -> Preprocess:
    """Read the preprocessing: pixels of 0 to 255 minus a color, or minus the mean color of an image."""
    # a color (3,), or an image (H, W, 3)
    average = np.ravel(file.normalization.get("averageImage", ()))
    if not average.size:
        raise WeightsError(
            f"{file.path}: has no meta.normalization.averageImage; save the network with meta"
        )

    side = float(np.ravel(file.normalization.get("imageSize", SIDE))[0])
    mean = tuple(average.reshape(-1, 3).mean(axis=0) / 255.0)
    std = (PIXEL_DEVIATION / 255,) * 3
    return Preprocess.model_validate({"resize": side, "crop": side, "mean": mean, "std": std})


def _read_pooling_options(file: DagNN) -> FieldValues:
    """Read the kind of pooling, and iterations and pre-normalization of the matrix square roots.

    Raises `WeightsError` if a layer is not supported.
    """
    for name, layer in file.layers.items():
        if layer.kind not in LAYER_KINDS:
            raise WeightsError(
                f"{file.path}: layer {name} has the type {layer.kind}, not supported"
            )

    roots = [name for name, layer in file.layers.items() if layer.kind == MATRIX_ROOT]
    if not roots:
        return {"component": "gap"}

    # If the square roots differ, unpacking raises a ValueError, which the import converts to a
    # WeightsError.
    (iterations,) = {int(layer_number(file, name, "iterNum")) for name in roots}
    (norm,) = {PRENORMS[layer.kind] for layer in file.layers.values() if layer.kind in PRENORMS}
    return {"component": "sop", "iterations": iterations, "prenorm": norm}


def _read_gate_options(file: DagNN, tensors: dict[str, Tensor]) -> FieldValues:
    """Read the options of the gate and of the mixture; norms and noise are the same in all released files."""
    dropouts = [name for name, layer in file.layers.items() if layer.kind == "DropOut"]
    gates = sorted(
        name for name in tensors if re.fullmatch(r"gate\.feature\.\d\.0\.weight", name)
    )

    return {
        "components": len(tensors["gate.weight"]),  # which has a row for each
        "chosen": int(layer_number(file, "gating", "topk")),
        "gate_widths": [len(tensors[name]) for name in gates],
        "gate_norm": True,
        "dropout": layer_number(file, dropouts[0], "rate") if dropouts else 0.0,
        "balance_weight": layer_number(file, "Balance_loss", "loss_weight"),
        "noise_per": "image",
        "fusion_norm": True,
    }


def _check_expansion(path: Path) -> None:
    """Raise `ValueError` if the compressed elements of a MATLAB file expand to much more than its size.

    Weights hardly shrink, but zlib can store a gigabyte of zeros in a megabyte, and scipy
    expands an element at once.
    """
    # Bytes that may still follow.
    allowed = max(MIN_EXPANDED_BYTES, MAX_EXPANSION * path.stat().st_size)

    with path.open("rb") as file:
        # The header ends in the order of bytes: IM if the lowest one comes first.
        order = "<" if file.read(HEADER_BYTES).endswith(b"IM") else ">"
        while len(tag := file.read(TAG.size)) == TAG.size:
            element_type, size = struct.unpack(f"{order}II", tag)
            if element_type != COMPRESSED:
                file.seek(size, os.SEEK_CUR)
                continue

            decompressor = zlib.decompressobj()
            while size > 0 and (block := file.read(min(size, BLOCK_BYTES))):
                size -= len(block)
                while block and allowed > 0:
                    allowed -= len(decompressor.decompress(block, BLOCK_BYTES))
                    block = decompressor.unconsumed_tail
            if allowed <= 0:
                raise ValueError("expands to far more than its size")


def read_dagnn(path: Path, digest: str) -> DagNN:
    """Read the network in a MATLAB file of version 5 to 7 with sha256 *digest*; raises `WeightsError`.

    The arrays of `net.params` become float64 tensors, the settings of `net.layers` a `Layer`
    each, by name. scipy makes a struct a dict, a struct array a list of dicts, text a `str`,
    one number a Python number, and an array a NumPy array; axes of length 1 are removed.
    """
    with path.open("rb") as file:
        if file.read(len(HDF5)) == HDF5:
            raise WeightsError(
                f"{path}: MATLAB's version 7.3 is not read; save it in MATLAB with the option -v7"
            )

    # Scipy reads the file after its size was checked.
    scipy_io = import_optional("scipy.io", "scipy", ".[train]", WeightsError, str(path))
    try:
        _check_expansion(path)
        content = scipy_io.loadmat(path, variable_names=VARIABLES, simplify_cells=True)
    except Exception as error:  # scipy raises many types for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(f"{path}: damaged MATLAB file ({reason}); copy it again") from error

    # What is there must be the parameters and the layers of a network.
    net = content.get("net", content)  # a file may hold the fields of `net` themselves
    try:  # a field may be missing or have another type
        tensors = {}
        for record in net["params"]:
            # TypeError for text
            values = np.asarray(record["value"]).astype(np.float64, casting="same_kind")
            tensors[record["name"]] = torch.from_numpy(values)

        layers = {
            record["name"]: Layer(record["type"].removeprefix("dagnn."), record.get("block"))
            for record in net["layers"]
        }

        checked = check_tensors(path, tensors)
        normalization = net.get("meta", {}).get("normalization", {})
        return DagNN(
            path=path,
            sha256=digest,
            tensors=checked,
            layers=layers,
            normalization=normalization,
        )
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path}: holds no MatConvNet network (`net` with `params` and `layers`, on the CPU); save the "
            "whole network"
        ) from error


def layer_number(file: DagNN, name: str, key: str) -> float:
    """Get the number *key* of the layer *name*; a stride has two values, which must be equal.

    Raises `ValueError` if they differ, and `LookupError` if there is no such number.
    """
    (value,) = set(np.ravel(file.layers[name].block[key]).tolist())
    return float(value)


IMPORTER = Importer(
    marks=("prediction_f",), convert=convert_gmsop, magic=MATLAB, read=read_dagnn
)
