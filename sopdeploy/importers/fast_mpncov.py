"""Importer of fast-MPN-COV: iSQRT-COV and B-CNN on ResNet and VGG-16.

Published files (`mpncovresnet50-15991845.pth`) have torchvision's names and `layer_reduce`. Training
checkpoints number the parts, `features.0` to `features.7`; the dimension reduction is
`representation.conv_dr_block`, or `features.8` and `.9` if a published network was fine-tuned. The pooling
follows from the classifier's input size. The stride of conv5_x follows from `arch`: 1 for `mpncovresnet50`, 2
for a `resnet50` trained with the pooling. A file with another `arch`, or none, needs `--option conv5_stride`.
"""

import re

from sopdeploy.errors import WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.conversion import ConvertedWeights, WeightFile, rename_tensors, triangle_side
from sopdeploy.importers.first_order import depth_name, resnet_depth

VGG_CHANNELS = 512
_TITLES = {"isqrt": "iSQRT-COV", "bcnn": "B-CNN", "gap": "average pooling"}
_FAMILIES = {"isqrt": "isqrt-resnet", "bcnn": "resnet", "gap": "resnet"}
_STAGES = {"0": "conv1", "1": "bn1", **{str(3 + stage): f"layer{stage}" for stage in range(1, 5)}}
REDUCTION = {
    "features.8": "layer_reduce",
    "features.9": "layer_reduce_bn",
    "representation.conv_dr_block.0": "layer_reduce",
    "representation.conv_dr_block.1": "layer_reduce_bn",
}
NUMBERED_TENSOR = re.compile(r"features\.(?P<stage>[014567])\.(?P<rest>.+)")


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
    channels = len(renamed.tensor(f"layer4.0.bn{2 if depth in {18, 34} else 3}.weight"))
    classes, length = renamed.tensor("fc.weight").shape
    pooling = detect_pooling(renamed, channels, length)
    kind = str(pooling["pooling.kind"])
    reduced = {"layer_reduce.weight", "features.8.weight"} & file.tensors.keys()
    stride = 1 if reduced else {f"mpncovresnet{depth}": 1, f"resnet{depth}": 2}.get(file.arch or "")
    detected = {"base_width": len(renamed.tensor("conv1.weight")), **pooling}
    undetermined = {}
    if stride is None:
        undetermined["conv5_stride"] = (
            f"its arch ({file.arch or 'missing'}) does not determine the stride of conv5_x, which is 1 for "
            f"mpncovresnet{depth} and 2 for resnet{depth}"
        )
    else:
        detected["conv5_stride"] = stride
    return ConvertedWeights(
        description=f"{_TITLES[kind]} on ResNet-{depth} of fast-MPN-COV",
        model=depth_name(_FAMILIES[kind], depth, 50) + (" --option pooling=bcnn" if kind == "bcnn" else ""),
        tensors=mapped,
        num_classes=classes,
        preprocess=Preprocess(),
        required={"depth": depth, "pooling.kind": kind},
        detected=detected,
        undetermined=undetermined,
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
    return f"{_STAGES[match['stage']]}.{match['rest']}" if match else source


def detect_pooling(renamed: WeightFile, channels: int, length: int) -> dict[str, str | int]:
    """Find the config of the pooling that maps *channels*, or the reduced ones, to *length* numbers."""
    reduction = renamed.tensors.get("pooling.layer_reduce.weight")
    width = channels if reduction is None else len(reduction)
    if triangle_side(length) == width:
        return {"pooling.kind": "isqrt", "pooling.width": width}
    if length == channels and reduction is None:
        return {"pooling.kind": "gap"}
    if length == channels**2 and reduction is None:
        return {"pooling.kind": "bcnn"}
    raise WeightsError(
        f"{renamed.path}: no supported pooling maps {width} channels to the {length} inputs of the classifier"
        " (compact bilinear pooling is not supported: its random parts are not stored)"
    )


def convert_mpncov_vgg(file: WeightFile, _model: str) -> ConvertedWeights | None:
    """Convert VGG-16 with batch norm and iSQRT-COV or B-CNN; None for other files."""
    first_tensors = {"features.0.weight", "features.1.running_mean", "features.3.weight"}
    classifiers = [name for name in file.tensors if name.startswith("classifier")]
    if not first_tensors <= file.tensors.keys() or not classifiers:
        return None
    mapped = rename_tensors(file, _rename_vgg)
    renamed = WeightFile(path=file.path, tensors={entry.name: entry.tensor for entry in mapped})
    classifier = "linear" if "classifier.weight" in file.tensors else "mlp"
    first, last = {
        "linear": ("classifier.weight", "classifier.weight"),
        "mlp": ("classifier.0.weight", "classifier.6.weight"),
    }[classifier]
    pooling = detect_pooling(renamed, VGG_CHANNELS, file.tensor(first).shape[1])
    kind = str(pooling["pooling.kind"])
    return ConvertedWeights(
        description=f"{_TITLES[kind]} on VGG-16 of fast-MPN-COV",
        model=f"vgg16-bn --option pooling={kind}",
        tensors=mapped,
        num_classes=len(file.tensor(last)),
        preprocess=Preprocess(),
        required={"pooling.kind": kind},
        detected=pooling | {"classifier": classifier},
        labels="imagenet",
    )


def _rename_vgg(source: str) -> str:
    """Return the name that the tensor *source* has in VGG-16 of this library."""
    part, _, leaf = source.rpartition(".")
    if part.startswith("representation.") and part in REDUCTION:
        return f"pooling.{REDUCTION[part]}.{leaf}"
    return f"layers.{source.removeprefix('features.')}" if source.startswith("features.") else source
