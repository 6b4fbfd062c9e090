"""Importer of GSoP-Nets on ResNets, as the released training script saves them.

Names are torchvision's, plus those of the blocks inside the last bottleneck of a stage and `layer_reduce` of
GSoP-Net2. The network is the released one (`RELEASED`): 3 Newton-Schulz iterations, triangle vectors column
by column. Fusion by sum and by maximum have the same tensors, so the user must choose.
"""

import math
import re
from typing import Any

from sopdeploy.errors import WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.conversion import (
    ConvertedWeights,
    MappedTensor,
    WeightFile,
    rename_tensors,
    row_wise_order,
    triangle_side,
)
from sopdeploy.importers.first_order import depth_name, resnet_depth
from sopdeploy.models.gsop import RELEASED

_BLOCK = {
    "conv_for_DR": "channel.reduction.0",
    "bn_for_DR": "channel.reduction.1",
    "row_bn": "channel.excitation.row_bn",
    "row_conv_group": "channel.excitation.row_conv",
    "fc_adapt_channels": "channel.excitation.conv",
    "conv_for_DR_spatial": "position.reduction.0",
    "bn_for_DR_spatial": "position.reduction.1",
    "row_bn_for_spatial": "position.excitation.row_bn",
    "row_conv_group_for_spatial": "position.excitation.row_conv",
    "fc_adapt_channels_for_spatial": "position.excitation.conv",
    "dilate_conv_for_concat1": "fusion.conv_channel",
    "dilate_conv_for_concat2": "fusion.conv_position",
    "bn_for_concat": "fusion.bn",
}
BLOCK_TENSOR = re.compile(
    r"(?P<stage>layer[1-4])\.(?P<block>\d+)\.(?P<part>[A-Za-z0-9_]+)\.(?P<leaf>[a-z_]+)"
)
SUM_OR_MAXIMUM = "sum and maximum (the code's fusion_avg and fusion_max) have the same tensors; choose one"


def convert_gsop(file: WeightFile, _model: str) -> ConvertedWeights | None:
    """Convert GSoP-Net1 or GSoP-Net2; None for a file without GSoP blocks."""
    if not any(".conv_for_DR" in name for name in file.tensors):
        return None
    depth = resnet_depth(file.path, file.tensors)
    net = 2 if "layer_reduce.weight" in file.tensors else 1
    detected = {"base_width": len(file.tensor("conv1.weight")), **_block_config(file)}
    detected["final_pooling"] = "gap" if net == 1 else "isqrt"
    if net == 2:
        detected["final_width"] = len(file.tensor("layer_reduce.weight"))
    attention = detected.get("attention")
    return ConvertedWeights(
        description=f"GSoP-Net{net} on ResNet-{depth}, {attention or 'sum or maximum'} blocks",
        model=depth_name(f"gsop-net{net}-resnet", depth, 50),
        tensors=tuple(_make_row_wise(file, mapped) for mapped in rename_tensors(file, _rename)),
        num_classes=len(file.tensor("fc.weight")),
        preprocess=Preprocess(),
        required={"depth": depth, "final_pooling": detected["final_pooling"]},
        detected=detected,
        defaults=RELEASED,
        undetermined={} if attention else {"attention": SUM_OR_MAXIMUM},
        labels="imagenet",
    )


def _rename(source: str) -> str:
    """Map a tensor name of the released code to the catalog's name; other names are unchanged."""
    if source.startswith(("layer_reduce.", "layer_reduce_bn.")):
        return f"pooling.{source}"
    match = BLOCK_TENSOR.fullmatch(source)
    if match and match["part"] in _BLOCK:
        return f"{match['stage']}.{match['block']}.attention.{_BLOCK[match['part']]}.{match['leaf']}"
    return source


def _block_config(file: WeightFile) -> dict[str, Any]:
    """Determine the options of the blocks (d, stages, kind, side of the position map) from the tensors."""
    matches = [match for name in file.tensors if (match := BLOCK_TENSOR.fullmatch(name))]
    parts = {match["part"] for match in matches}
    reductions = [
        match for match in matches if match["part"].startswith("conv_for_DR") and match["leaf"] == "weight"
    ]
    config: dict[str, Any] = {
        "cov_width": len(file.tensor(reductions[0][0])),
        "block_stages": sorted({match["stage"] for match in reductions}),
    }
    for name in file.tensors:
        if name.endswith(".row_bn_for_spatial.weight"):
            config["position_side"] = math.isqrt(len(file.tensor(name)))
    if "dilate_conv_for_concat1" in parts:
        config["attention"] = "concatenation"
    elif not {"conv_for_DR", "conv_for_DR_spatial"} <= parts:  # both halves without it: sum or maximum
        config["attention"] = "channel" if "conv_for_DR" in parts else "position"
    return config


def _make_row_wise(file: WeightFile, mapped: MappedTensor) -> MappedTensor:
    """Permute the classifier of GSoP-Net2 from column-wise to row-wise triangles."""
    if mapped.name != "fc.weight" or "layer_reduce.weight" not in file.tensors:
        return mapped
    width = len(file.tensor("layer_reduce.weight"))
    if triangle_side(file.tensor("fc.weight").shape[1]) != width:
        raise WeightsError(f"{file.path}: fc.weight does not fit the triangle of {width} channels")
    return mapped._replace(tensor=mapped.tensor.index_select(1, row_wise_order(width)))
