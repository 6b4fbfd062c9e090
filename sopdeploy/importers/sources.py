"""The registry: which projects' files can be imported. The first that recognises a file translates it."""

from sopdeploy.errors import WeightsError
from sopdeploy.importers.cifar_resnet import CifarResNet
from sopdeploy.importers.fast_mpncov import FastMpnCovResNet
from sopdeploy.importers.fast_mpncov_vgg import FastMpnCovVgg
from sopdeploy.importers.gmsop import GMSOPNetwork
from sopdeploy.importers.gsop import GSoPNet
from sopdeploy.importers.source import Source
from sopdeploy.importers.timm_network import TimmNetwork
from sopdeploy.importers.torchvision_resnet import TorchvisionResNet
from sopdeploy.importers.weight_file import WeightFile

SOURCES: tuple[Source, ...] = (
    TimmNetwork(),
    GSoPNet(),
    FastMpnCovResNet(),
    FastMpnCovVgg(),
    CifarResNet(),
    GMSOPNetwork(),
    TorchvisionResNet(),
)


def recognise(file: WeightFile, name: str) -> Source:
    """Return the source of *file*; raises `WeightsError` with its first names where nobody knows it."""
    for source in SOURCES:
        if source.recognises(file, name):
            return source
    some = ", ".join(list(file.tensors)[:3])
    known = ", ".join(sorted({source.project for source in SOURCES}))
    raise WeightsError(f"{file.path}: its tensors ({some} ..) are those of none of {known}")
