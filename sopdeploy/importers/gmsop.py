"""GM-SOP's networks for 64-pixel images: GAP, SR-SOP, GM-GAP and GM-SOP, on ResNet and WRN, in MatConvNet.

Paper: Wang et al., GM-SOP (NeurIPS 2018). Arrays are found by name, switches in the layers' settings.
Letters: d channels of a covariance, N components.

The released networks see 0..255 less the mean, and their conv1 has learnt to divide by 60:
`input_scaling="raw"` divides first, so conv1 comes out 60 times larger. Vectors of a triangle
stand column by column; each tensor with such an axis is put in rows' order, once.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sopdeploy.backbones.resnet import LOW_RESOLUTION_WIDTHS as WIDTHS
from sopdeploy.backbones.resnet import RAW_SCALE
from sopdeploy.errors import WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.fit import column_positions
from sopdeploy.importers.matconvnet import (
    batch_norm,
    conv5_stride,
    dropout,
    in_order,
    integer,
    kernel,
    known_layers,
    named,
    pointwise,
    root_switches,
    scalar,
    vector,
)
from sopdeploy.importers.resnets import tensor
from sopdeploy.importers.source import Mapped, Translation, WeightFile

STAGES = (2, 3, 4, 5)
LETTERS = "abcdefgh"  # of a component's convolutions
FULL = 255.0
SIDE = 64
NAMES = {
    ("gated", "gap", 2, 1): "gmgap-16-8-resnet18",
    ("gated", "sop", 2, 1): "gmsop-16-8-resnet18",
    ("gated", "sop", 6, 1): "gmsop-16-8-resnet50",
    ("gated", "gap", 4, 2): "gmgap-16-8-wrn36-2",
    ("gated", "sop", 4, 2): "gmsop-16-8-wrn36-2",
    ("single", "gap", 2, 1): "resnet18-64px",
    ("single", "gap", 6, 1): "resnet50-64px",
    ("single", "sop", 2, 1): "srsop-resnet18",
    **{("single", "gap", 4, widen): f"wrn36-{widen}" for widen in (1, 2, 5)},
}
TITLES = {"gated": {"gap": "GM-GAP", "sop": "GM-SOP"}, "single": {"gap": "GAP", "sop": "SR-SOP"}}
NOTES = (
    "classes are numbered: downsampled ImageNet does not list them in the usual order; give --labels",
    "its pictures may have been stored with height and width swapped: compare with the published error",
)


class GMSOPNetwork:
    """A MatConvNet network with GM-SOP's names."""

    project = "GM-SOP"

    def recognises(self, file: WeightFile, _name: str, /) -> bool:
        """Say whether it is a MatConvNet network with the two ends of GM-SOP's."""
        return file.is_matconvnet and {"conv1_f", "conv2_1a_f", "prediction_f"} <= file.tensors.keys()

    def translate(self, file: WeightFile, _name: str, /) -> Translation:
        """Return the network with the switches its layers hold."""
        known_layers(file)
        kind = "gated" if "gating_w" in file.tensors else "single"
        switches = backbone_switches(file)
        roots = root_switches(file)
        component = "sop" if roots else "gap"
        if kind == "gated":
            switches |= gate_switches(file)
        order = column_positions(triangle_of(switches)) if roots else None
        blocks, widen = switches["blocks_per_stage"], switches["widen"]
        must = {"component": component, "blocks_per_stage": blocks, "widen": widen}
        counted = ("components", "chosen") if kind == "gated" else ()
        return Translation(
            looks_like=f"{TITLES[kind][component]}, {blocks} blocks a stage, {widen} times as wide",
            name=NAMES.get((kind, component, blocks, widen)),
            mapped=(
                *backbone(file, blocks),
                *(gate(file, switches, roots) if kind == "gated" else ()),
                *end(file, order),
            ),
            num_classes=len(pointwise(file, "prediction_f")),
            preprocess=preprocess_of(file),
            must=must | {key: switches[key] for key in counted} | ({} if counted else {"components": 1}),
            read=switches | roots,
            notes=NOTES,
        )


def backbone_switches(file: WeightFile) -> dict[str, Any]:
    """Return n, k and what else the backbone's tensors and strides say."""
    blocks = sum(name.startswith("conv2_") and name.endswith("a_f") for name in file.tensors)
    return {
        "blocks_per_stage": blocks,
        "widen": len(kernel(file, "conv2_1a_f")) // WIDTHS[0],
        "project_first_stage": "conv2_1_adapt_conv_f" in file.tensors,
        "conv5_stride": conv5_stride(file),
        "input_scaling": "raw",
    }


def gate_switches(file: WeightFile) -> dict[str, Any]:
    """Return K, N, widths and losses of a mixture."""
    choice = named(file, "gating")
    return {
        "components": integer(file.path, choice, "CM_num"),
        "chosen": integer(file.path, choice, "topk"),
        "component_widths": [len(kernel(file, name)) for name in steps(file, 1)],
        "gate_widths": [len(kernel(file, f"gating{layer}_f")) for layer in gate_layers(file)],
        "dropout": dropout(file),
        "balance_weight": scalar(file.path, named(file, "Balance_loss"), "loss_weight"),
        "noise_per": "image",
    }


def triangle_of(switches: dict[str, Any]) -> int:
    """Return d of the classifier's vector."""
    widths = switches.get("component_widths", ())
    return int(widths[-1]) if widths else WIDTHS[-1] * int(switches["widen"])


def steps(file: WeightFile, component: int) -> list[str]:
    """Return the names of a component's convolutions, in order."""
    names = (f"CM_{component}_{letter}_f" for letter in LETTERS)
    return [name for name in names if name in file.tensors]


def gate_layers(file: WeightFile) -> range:
    """Return the numbers of the gate's prediction layers."""
    return range(1, 1 + sum(name.startswith("gating") and name[6:-2].isdigit() for name in file.tensors))


def backbone(file: WeightFile, blocks: int) -> Iterator[Mapped]:
    """Yield the tensors of stem and stages."""
    yield Mapped("conv1.weight", ("conv1_f",), kernel(file, "conv1_f") / RAW_SCALE, "axes turned, times 60")
    yield Mapped("conv1.bias", ("conv1_b",), vector(file, "conv1_b"))
    yield from batch_norm(file, "conv1_bn", "bn1")
    for stage in STAGES:
        for block in range(blocks):
            theirs, ours = f"conv{stage}_{block + 1}", f"layer{stage - 1}.{block}"
            yield from convolution(file, f"{theirs}a", f"{ours}.conv1", f"{ours}.bn1")
            yield from convolution(file, f"{theirs}b", f"{ours}.conv2", f"{ours}.bn2")
            if f"{theirs}_adapt_conv_f" in file.tensors:
                shortcut = f"{ours}.downsample"
                yield from convolution(file, f"{theirs}_adapt_conv", f"{shortcut}.0", f"{shortcut}.1")


def convolution(file: WeightFile, theirs: str, ours: str, norm: str) -> Iterator[Mapped]:
    """Yield a convolution without bias and its batch norm."""
    yield Mapped(f"{ours}.weight", (f"{theirs}_f",), kernel(file, f"{theirs}_f"), "axes turned")
    yield from batch_norm(file, f"{theirs}_bn", norm)


def gate(file: WeightFile, switches: dict[str, Any], roots: dict[str, Any]) -> Iterator[Mapped]:
    """Yield the tensors of the gate and the components, all components of a step in one."""
    for layer in gate_layers(file):
        part = f"gate.feature.{layer - 1}"
        yield from convolution(file, f"gating{layer}", f"{part}.0", f"{part}.1")
    order = column_positions(switches["gate_widths"][-1]) if roots else None
    for theirs, ours in (("gating_w", "gate.weight"), ("gating_noise_w", "gate.noise.weight")):
        weight = tensor(file.path, file.tensors, theirs)
        if weight.dim() != 2:
            raise WeightsError(f"{file.path}: {theirs} is {tuple(weight.shape)}, not (features, components)")
        yield Mapped(ours, (theirs,), *in_order(weight.T, order, 1, "axes turned"))
    components = [steps(file, component + 1) for component in range(switches["components"])]
    for step, names in enumerate(zip(*components, strict=False)):
        matrices = [pointwise(file, name) for name in names]
        if len({matrix.shape for matrix in matrices}) != 1:
            raise WeightsError(f"{file.path}: {names[0]} and its likes have different sizes")
        yield Mapped(f"mixture.weights.{step}", names, torch.stack(matrices), "axes turned, stacked")


def end(file: WeightFile, order: Tensor | None) -> Iterator[Mapped]:
    """Yield the fusion's batch norm, where there is one, and the classifier."""
    if "fusion_bn_bn_w" in file.tensors:
        yield from batch_norm(file, "fusion_bn_bn", "head.bn", order)
    weight = in_order(pointwise(file, "prediction_f"), order, 1, "axes turned")
    yield Mapped("head.fc.weight", ("prediction_f",), *weight)
    yield Mapped("head.fc.bias", ("prediction_b",), vector(file, "prediction_b"))


def preprocess_of(file: WeightFile) -> Preprocess:
    """Return the pictures the network saw: 0..255 less the mean colour, so the deviation is 1 / 255."""
    if file.average is None:
        raise WeightsError(f"{file.path}: meta.normalization.averageImage holds no colour; save it with meta")
    side = file.image_size or SIDE
    red, green, blue = (channel / FULL for channel in file.average)
    return Preprocess(resize=side, crop=side, mean=(red, green, blue), std=(1 / FULL, 1 / FULL, 1 / FULL))
