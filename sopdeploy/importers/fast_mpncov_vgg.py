"""fast-MPN-COV's VGG-D with batch norm: `features` is numbered as here, three layers classify, or one."""

import re

from sopdeploy.errors import WeightsError
from sopdeploy.importers.fast_mpncov import REDUCTION, TITLES, pooling_of
from sopdeploy.importers.resnet_layout import matrix
from sopdeploy.importers.source import Translation, renamed
from sopdeploy.importers.weight_file import WeightFile
from sopdeploy.preprocess import Preprocess

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
        mapped = renamed(file, place)
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


def place(name: str) -> str | None:
    """Return what *name* is here."""
    part, _, leaf = name.rpartition(".")
    if part.startswith("representation.") and part in REDUCTION:
        return f"pooling.{REDUCTION[part]}.{leaf}"
    if convolution := CONVOLUTION.fullmatch(name):
        return f"layers.{convolution[1]}.{convolution[2]}"
    return name if CLASSIFIER.fullmatch(name) else None
