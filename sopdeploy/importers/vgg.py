"""Importers of VGG-16: torchvision's, with or without batch norm, and fast-MPN-COV's with another pooling.

All store the convolutions under `features`, with the same numbers as `layers` here.
"""

from sopdeploy.errors import WeightsError
from sopdeploy.files import sha256
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.importers.fast_mpncov import REDUCTION, TITLES, detect_pooling
from sopdeploy.importers.resnets import published_preprocess
from sopdeploy.importers.source import ConvertedWeights, WeightFile, rename_tensors

CHANNELS = 512
CONVOLUTIONS = 13
FLATTENED = CHANNELS * 7 * 7  # inputs of the classifier of the plain network
MODELS = {"isqrt": "isqrt-vgg16", "bcnn": "bcnn-vgg16"}


def convert_torchvision_vgg(file: WeightFile, _model: str) -> ConvertedWeights | None:
    """Convert VGG-16 of torchvision; None for other files. `features` becomes `layers`."""
    first = file.tensors.get("classifier.0.weight")
    convolutions = [
        name for name, tensor in file.tensors.items() if name.startswith("features.") and tensor.dim() == 4
    ]
    if first is None or first.shape[1:] != (FLATTENED,) or not convolutions:
        return None
    if len(convolutions) != CONVOLUTIONS:
        raise WeightsError(
            f"{file.path}: a VGG with {len(convolutions)} convolutions; the catalog has only VGG-16, with 13"
        )
    batch_norm = "features.1.running_mean" in file.tensors
    published = published_preprocess("vgg16_bn" if batch_norm else "vgg16", sha256(file.path))
    return ConvertedWeights(
        description=f"VGG-16 of torchvision, {'with' if batch_norm else 'without'} batch norm",
        model="vgg16-bn" if batch_norm else "vgg16",
        tensors=rename_tensors(file, _rename),
        num_classes=len(file.tensor("classifier.6.weight")),
        preprocess=published[0] if published else Preprocess(),
        required={"pooling.kind": "flatten", "classifier": "mlp"},
        detected={"batch_norm": batch_norm},
        labels="imagenet",
        notes=(published[1],) if published else (),
    )


def convert_mpncov_vgg(file: WeightFile, _model: str) -> ConvertedWeights | None:
    """Convert VGG-16 with batch norm and iSQRT-COV or B-CNN; None for other files.

    `features` becomes `layers`.
    """
    first_tensors = {"features.0.weight", "features.1.running_mean", "features.3.weight"}
    classifiers = [name for name in file.tensors if name.startswith("classifier")]
    if not first_tensors <= file.tensors.keys() or not classifiers:
        return None
    mapped = rename_tensors(file, _rename)
    linear = "classifier.weight" in file.tensors
    first, last = ("classifier.weight",) * 2 if linear else ("classifier.0.weight", "classifier.6.weight")
    pooling = detect_pooling(file, mapped, CHANNELS, file.tensor(first).shape[1])
    kind = str(pooling["pooling.kind"])
    if kind == "gap":
        raise WeightsError(
            f"{file.path}: VGG-16 with average pooling is not in the catalog"
            "; `sopdeploy models` lists the networks"
        )
    classifier = "linear" if linear else "mlp"
    default = "mlp" if kind == "isqrt" else "linear"
    model = MODELS[kind]
    return ConvertedWeights(
        description=f"{TITLES[kind]} on VGG-16 of fast-MPN-COV",
        model=model if classifier == default else f"{model} --set classifier={classifier}",
        tensors=mapped,
        num_classes=len(file.tensor(last)),
        preprocess=Preprocess(),
        required={"pooling.kind": kind},
        detected=pooling | {"classifier": classifier},
        labels="imagenet",
    )


def _rename(source: str) -> str:
    part, _, leaf = source.rpartition(".")
    if part.startswith("representation.") and part in REDUCTION:
        return f"pooling.{REDUCTION[part]}.{leaf}"
    return f"layers.{source.removeprefix('features.')}" if source.startswith("features.") else source
