"""fast-MPN-COV: iSQRT-COV on ResNets, as published and as its training script saves them.

Published files (`mpncovresnet50-15991845.pth`) have torchvision's names and `layer_reduce`. Training
checkpoints number the same parts as a sequence, `features.0` to `features.7`; dimension reduction is
`representation.conv_dr_block`, or `features.8` and `.9` where a published network was fine-tuned. Which
pooling it was is told by the length of what `classifier` sees, and only `arch` tells the stride of
conv5_x: 1 for `mpncovresnet50`, 2 for a `resnet50` that was trained with the pooling.
"""

import re

from sopdeploy.errors import WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.fit import triangle_side
from sopdeploy.importers.resnets import is_part, matrix, resnet_depth, tensor
from sopdeploy.importers.source import Mapped, Translation, WeightFile, renamed
from sopdeploy.models.registry import CATALOG

PARTS = {"0": "conv1", "1": "bn1", **{str(3 + stage): f"layer{stage}" for stage in range(1, 5)}}
REDUCTION = {
    "features.8": "layer_reduce",
    "features.9": "layer_reduce_bn",
    "representation.conv_dr_block.0": "layer_reduce",
    "representation.conv_dr_block.1": "layer_reduce_bn",
}
NUMBERED = re.compile(r"features\.([014567])\.(.+)")
NO_STRIDE = "the file does not say the stride of conv5_x: 1 for mpncovresnet, 2 for resnet with the pooling"


class FastMpnCovResNet:
    """iSQRT-COV, B-CNN or plain averages behind a ResNet."""

    project = "fast-MPN-COV"

    def recognises(self, file: WeightFile, _name: str, /) -> bool:
        """Say whether there is a ResNet with DR, or one that is numbered; GSoP-Net2 has blocks besides."""
        names = file.tensors.keys()
        if any(".conv_for_DR" in name for name in names):
            return False
        published = {"layer4.0.conv1.weight", "layer_reduce.weight"} <= names
        return published or "features.4.0.conv1.weight" in names

    def translate(self, file: WeightFile, _name: str, /) -> Translation:
        """Return the network with its pooling under `pooling`."""
        mapped = renamed(file, place)
        tensors = {entry.ours: entry.tensor for entry in mapped}
        depth = resnet_depth(file.path, tensors)
        classes, length = matrix(file.path, tensors, "fc.weight").shape
        channels = len(tensor(file.path, tensors, f"layer4.0.bn{2 if depth in {18, 34} else 3}.weight"))
        pooling = pooling_of(file, mapped, channels, length)
        stride = conv5_stride(file)
        kind = str(pooling["kind"])
        name = f"isqrt-resnet{depth}" if kind == "isqrt" else f"resnet{depth}"
        return Translation(
            looks_like=f"{TITLES[kind]} on ResNet-{depth} of {self.project}",
            name=(f"{name} --set pooling=bcnn" if kind == "bcnn" else name) if name in CATALOG else None,
            mapped=mapped,
            num_classes=classes,
            preprocess=Preprocess(),
            must={"depth": depth, "pooling.kind": kind},
            read={"pooling": pooling} if stride is None else {"pooling": pooling, "conv5_stride": stride},
            ask={} if stride is not None else {"conv5_stride": NO_STRIDE},
            labels="imagenet",
        )


TITLES = {"isqrt": "iSQRT-COV", "bcnn": "B-CNN", "gap": "average pooling"}


def place(name: str) -> str | None:
    """Return what *name* is here, whether published or numbered."""
    part, _, leaf = name.rpartition(".")
    if part in REDUCTION or part in REDUCTION.values():
        return f"pooling.{REDUCTION.get(part, part)}.{leaf}"
    if part == "classifier":
        return f"fc.{leaf}"
    numbered = NUMBERED.fullmatch(name)
    ours = f"{PARTS[numbered[1]]}.{numbered[2]}" if numbered else name
    return ours if is_part(ours) else None


def pooling_of(
    file: WeightFile, mapped: tuple[Mapped, ...], channels: int, length: int
) -> dict[str, str | int]:
    """Return the pooling that makes *length* numbers of *channels*, or of those after DR."""
    reduced = [len(entry.tensor) for entry in mapped if entry.ours == "pooling.layer_reduce.weight"]
    width = reduced[0] if reduced else channels
    if triangle_side(length) == width:
        return {"kind": "isqrt", "width": width}
    if length == channels and not reduced:
        return {"kind": "gap"}
    if length == channels**2 and not reduced:
        return {"kind": "bcnn"}
    raise WeightsError(
        f"{file.path}: its classifier sees {length} numbers, which neither iSQRT-COV, B-CNN nor "
        f"averages make of {width} channels (compact bilinear pooling: its random parts are not in the file)"
    )


def conv5_stride(file: WeightFile) -> int | None:
    """Return the stride of conv5_x, `None` where nothing in the file tells it."""
    names = file.tensors.keys()
    if "layer_reduce.weight" in names or "features.8.weight" in names:
        return 1
    if file.arch is None:
        return None
    return 1 if file.arch.startswith("mpncov") else 2


CHANNELS = 512
CONVOLUTION = re.compile(r"features\.(\d+)\.([a-z_]+)")
CLASSIFIER = re.compile(r"classifier\.([036]\.)?(weight|bias)")
NAMES = {"isqrt": "isqrt-vgg16", "bcnn": "bcnn-vgg16"}


class FastMpnCovVgg:
    """iSQRT-COV or B-CNN behind VGG-16 with batch norm."""

    project = "fast-MPN-COV"

    def recognises(self, file: WeightFile, _name: str, /) -> bool:
        """Say whether there are VGG's first two convolutions with batch norm, and a classifier."""
        names = file.tensors.keys()
        first = {"features.0.weight", "features.1.running_mean", "features.3.weight"} <= names
        return first and any(name.startswith("classifier") for name in names)

    def translate(self, file: WeightFile, _name: str, /) -> Translation:
        """Return the network with `features` as `layers`, and its pooling under `pooling`."""
        mapped = renamed(file, place_of_fast_mpncov_vgg)
        linear = "classifier.weight" in file.tensors
        first = "classifier.weight" if linear else "classifier.0.weight"
        last = "classifier.weight" if linear else "classifier.6.weight"
        pooling = pooling_of(file, mapped, CHANNELS, matrix(file.path, file.tensors, first).shape[1])
        kind = str(pooling["kind"])
        if kind == "gap":
            raise WeightsError(f"{file.path}: VGG-16 before plain averages is not in the catalog")
        classifier = "linear" if linear else "mlp"
        own = classifier == ("mlp" if kind == "isqrt" else "linear")
        return Translation(
            looks_like=f"{TITLES[kind]} on VGG-16 of {self.project}",
            name=NAMES[kind] if own else f"{NAMES[kind]} --set classifier={classifier}",
            mapped=mapped,
            num_classes=len(matrix(file.path, file.tensors, last)),
            preprocess=Preprocess(),
            must={"pooling.kind": kind},
            read={"pooling": pooling, "classifier": classifier},
            labels="imagenet",
        )


def place_of_fast_mpncov_vgg(name: str) -> str | None:
    """Return what *name* is here."""
    part, _, leaf = name.rpartition(".")
    if part.startswith("representation.") and part in REDUCTION:
        return f"pooling.{REDUCTION[part]}.{leaf}"
    if convolution := CONVOLUTION.fullmatch(name):
        return f"layers.{convolution[1]}.{convolution[2]}"
    return name if CLASSIFIER.fullmatch(name) else None
