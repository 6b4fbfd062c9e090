"""Importer of fast-MPN-COV: iSQRT-COV and B-CNN on ResNet; `vgg` imports its VGG-16.

Published files (`mpncovresnet50-15991845.pth`) have torchvision's names and `layer_reduce`. Training
checkpoints number the parts, `features.0` to `features.7`; the dimension reduction is
`representation.conv_dr_block`, or `features.8` and `.9` if a published network was fine-tuned. The pooling
follows from the classifier's input size. The stride of conv5_x follows from `arch`: 1 for `mpncovresnet50`, 2
for a `resnet50` trained with the pooling. A file with another `arch`, or none, needs `--set conv5_stride`.
"""

import re

from sopdeploy.errors import WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.fit import triangle_side
from sopdeploy.importers.resnets import resnet_depth, stem_width
from sopdeploy.importers.source import ConvertedWeights, MappedTensor, WeightFile, rename_tensors
from sopdeploy.models.registry import CATALOG

TITLES = {"isqrt": "iSQRT-COV", "bcnn": "B-CNN", "gap": "average pooling"}
STAGES = {"0": "conv1", "1": "bn1", **{str(3 + stage): f"layer{stage}" for stage in range(1, 5)}}
REDUCTION = {
    "features.8": "layer_reduce",
    "features.9": "layer_reduce_bn",
    "representation.conv_dr_block.0": "layer_reduce",
    "representation.conv_dr_block.1": "layer_reduce_bn",
}
NUMBERED_TENSOR = re.compile(r"features\.(?P<stage>[014567])\.(?P<rest>.+)")
UNKNOWN_STRIDE = (
    "the tensors do not determine the stride of conv5_x: 1 for mpncovresnet, 2 for resnet with the pooling"
)


def convert_mpncov_resnet(file: WeightFile, _model: str) -> ConvertedWeights | None:
    """Convert a ResNet with iSQRT-COV, B-CNN or average pooling; None for other files.

    Such a file has `layer_reduce` or numbered parts. The dimension reduction becomes a part of `pooling`.
    """
    published = {"layer4.0.conv1.weight", "layer_reduce.weight"} <= file.tensors.keys()
    if not published and "features.4.0.conv1.weight" not in file.tensors:
        return None
    mapped = rename_tensors(file, _rename_resnet)
    renamed = WeightFile(path=file.path, tensors={entry.name: entry.tensor for entry in mapped})
    depth = resnet_depth(file.path, renamed.tensors)
    classes, length = renamed.tensor("fc.weight").shape
    channels = len(renamed.tensor(f"layer4.0.bn{2 if depth in {18, 34} else 3}.weight"))
    pooling = detect_pooling(file, mapped, channels, length)
    kind = str(pooling["pooling.kind"])
    reduced = {"layer_reduce.weight", "features.8.weight"} & file.tensors.keys()
    stride = 1 if reduced else {f"mpncovresnet{depth}": 1, f"resnet{depth}": 2}.get(file.arch or "")
    unknown = UNKNOWN_STRIDE
    if file.arch is not None:
        unknown = f"its arch {file.arch!r} is unknown for ResNet-{depth}, and {UNKNOWN_STRIDE}"
    model = f"isqrt-resnet{depth}" if kind == "isqrt" else f"resnet{depth}"
    return ConvertedWeights(
        description=f"{TITLES[kind]} on ResNet-{depth} of fast-MPN-COV",
        model=(f"{model} --set pooling=bcnn" if kind == "bcnn" else model) if model in CATALOG else None,
        tensors=mapped,
        num_classes=classes,
        preprocess=Preprocess(),
        required={"depth": depth, "pooling.kind": kind},
        detected={"base_width": stem_width(renamed), **pooling}
        | ({} if stride is None else {"conv5_stride": stride}),
        undetermined={} if stride is not None else {"conv5_stride": unknown},
        labels="imagenet",
    )


def _rename_resnet(source: str) -> str:
    """Return the name that the tensor *source* has in the ResNets of this library."""
    part, _, leaf = source.rpartition(".")
    part = REDUCTION.get(part, part)
    if part in REDUCTION.values():
        return f"pooling.{part}.{leaf}"
    if part == "classifier":
        return f"fc.{leaf}"
    match = NUMBERED_TENSOR.fullmatch(source)
    return f"{STAGES[match['stage']]}.{match['rest']}" if match else source


def detect_pooling(
    file: WeightFile, mapped: tuple[MappedTensor, ...], channels: int, length: int
) -> dict[str, str | int]:
    """Find the config of the pooling that maps *channels*, or the reduced ones, to *length* numbers."""
    reduced = [
        len(file.tensor(entry.sources[0])) for entry in mapped if entry.name == "pooling.layer_reduce.weight"
    ]
    width = reduced[0] if reduced else channels
    if triangle_side(length) == width:
        return {"pooling.kind": "isqrt", "pooling.width": width}
    if length == channels and not reduced:
        return {"pooling.kind": "gap"}
    if length == channels**2 and not reduced:
        return {"pooling.kind": "bcnn"}
    raise WeightsError(
        f"{file.path}: no supported pooling turns {width} channels into the {length} inputs of its classifier"
        " (compact bilinear pooling is not supported: its random parts are not stored)"
    )
