"""GSoP-Nets on ResNets, as the released training script saves them.

Names are torchvision's, with the blocks' own inside the last bottleneck of a stage and `layer_reduce` for
GSoP-Net2; the key map is in `blocks/gsop_block.py`. The network is the released one (`RELEASED`), whose
Newton-Schulz runs 3 steps and whose vector stands column by column. Fusing by sum and by maximum
have the same tensors, so the user has to say which it was.
"""

import math
import re

import torch

from sopdeploy.errors import WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.fit import column_positions, triangle_side
from sopdeploy.importers.resnets import is_part, matrix, resnet_depth, tensor
from sopdeploy.importers.source import Mapped, Translation, WeightFile, renamed
from sopdeploy.models.gsop import RELEASED
from sopdeploy.models.registry import CATALOG

BLOCK = {
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
PARTS = re.compile(r"(layer[1-4])\.(\d+)\.([A-Za-z0-9_]+)\.([a-z_]+)")
SUM_OR_MAXIMUM = "sum and maximum (the code's fusion_avg and fusion_max) have the same tensors; say which"


class GSoPNet:
    """GSoP-Net1 and GSoP-Net2 with channel-wise, position-wise or fused blocks."""

    project = "GSoP"

    def recognises(self, file: WeightFile, _name: str, /) -> bool:
        """Say whether there is a block."""
        return any(".conv_for_DR" in name for name in file.tensors)

    def translate(self, file: WeightFile, _name: str, /) -> Translation:
        """Return the released network with the switches that its tensors show."""
        depth = resnet_depth(file.path, file.tensors)
        net = 2 if "layer_reduce.weight" in file.tensors else 1
        attention = attention_of(file)
        read = {**block_widths(file), "final_pooling": "gap" if net == 1 else "isqrt"}
        if net == 2:
            read["final_width"] = len(file.tensors["layer_reduce.weight"])
        name = f"gsop-net{net}-resnet{depth}"
        return Translation(
            looks_like=f"GSoP-Net{net} on ResNet-{depth}, {attention or 'sum or maximum'} blocks",
            name=name if name in CATALOG else None,
            mapped=tuple(rowwise(file, entry) for entry in renamed(file, place)),
            num_classes=len(matrix(file.path, file.tensors, "fc.weight")),
            preprocess=Preprocess(),
            must={"depth": depth, "final_pooling": read["final_pooling"]},
            read=read if attention is None else {**read, "attention": attention},
            usual=RELEASED,
            ask={} if attention else {"attention": SUM_OR_MAXIMUM},
            labels="imagenet",
        )


def place(name: str) -> str | None:
    """Return what *name* is here."""
    if name.startswith(("layer_reduce.", "layer_reduce_bn.")):
        return f"pooling.{name}"
    found = PARTS.fullmatch(name)
    if found and found[3] in BLOCK:
        return f"{found[1]}.{found[2]}.attention.{BLOCK[found[3]]}.{found[4]}"
    return name if is_part(name) else None


def attention_of(file: WeightFile) -> str | None:
    """Return which blocks these are, `None` where they are fused by sum or by maximum."""
    parts = {found[3] for name in file.tensors if (found := PARTS.fullmatch(name))}
    if "dilate_conv_for_concat1" in parts:
        return "concatenation"
    if {"conv_for_DR", "conv_for_DR_spatial"} <= parts:
        return None
    return "channel" if "conv_for_DR" in parts else "position"


def block_widths(file: WeightFile) -> dict[str, object]:
    """Return d, the side of the map of positions and the stages with blocks, off the tensors' shapes."""
    blocks = {
        name: found[1]
        for name in file.tensors
        if (found := PARTS.fullmatch(name)) and found[3].startswith("conv_for_DR") and found[4] == "weight"
    }
    widths: dict[str, object] = {
        "cov_width": len(file.tensors[next(iter(blocks))]),
        "block_stages": sorted(set(blocks.values())),
    }
    for name in file.tensors:
        if name.endswith(".row_bn_for_spatial.weight"):
            widths["position_side"] = math.isqrt(len(file.tensors[name]))
    return widths


def rowwise(file: WeightFile, entry: Mapped) -> Mapped:
    """Return GSoP-Net2's classifier with its vector in the order of here, every other tensor as it is."""
    if entry.ours != "fc.weight" or "layer_reduce.weight" not in file.tensors:
        return entry
    width = len(tensor(file.path, file.tensors, "layer_reduce.weight"))
    if triangle_side(matrix(file.path, file.tensors, "fc.weight").shape[1]) != width:
        raise WeightsError(f"{file.path}: fc.weight does not see the triangle of {width} channels")
    permuted = torch.index_select(entry.tensor, 1, column_positions(width))
    return entry._replace(tensor=permuted, how="columns of the triangle into rows' order")
