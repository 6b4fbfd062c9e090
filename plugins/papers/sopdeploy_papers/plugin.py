"""The names that this package adds to sopdeploy; what they stand for is imported when it is used."""

from sopdeploy.base.plugins import (
    FIRST_BYTES,
    IMPORTERS,
    JOINT,
    MODELS,
    OPTIMIZERS,
    POOLINGS,
    TEACHERS,
)
from sopdeploy.models.registry import Entry

_POOLINGS = {
    "cbp": "sketch:CompactBilinearConfig",
    "kernel": "sketch:KernelPoolingConfig",
    "netvlad": "codebook:NetVLADConfig",
    "netfv": "codebook:NetFVConfig",
    "dropcov": "dropcov:DropCovConfig",
}
_ADAHESSIAN = "sopdeploy_papers.adahessian:AdaHessianConfig"
_JOINT_TEACHER = "sopdeploy_papers.joint_teacher:JointTeacher"
_GMSOP = "sopdeploy_papers.gmsop_weights:IMPORTER"
_PSDR = {
    "psdr-resnet50": (
        "SupervisedPSDRResNet",
        "ResNet-50 before PSDR and iSQRT-COV; its auxiliary heads are detached",
    ),
    "psdr-resnet50-no-aux": (
        "PSDRResNet",
        "ResNet-50 before progressive reduction and iSQRT-COV, without auxiliary heads",
    ),
}
_LOW_RANK_VGG = Entry(
    "sopdeploy_papers.poolings.low_rank:LowRankVGG",
    "sopdeploy_papers.poolings.low_rank:LowRankConfig",
    {},
    "VGG-16 with low-rank bilinear pooling",
)


def register() -> None:
    """Register the poolings, the networks, the optimizer, the teacher and the importer of this package."""
    for name, config in _POOLINGS.items():
        POOLINGS.register(name, f"sopdeploy_papers.poolings.{config}", __name__)
    for name, (network, summary) in _PSDR.items():
        source = f"sopdeploy_papers.psdr:{network}"
        config = "sopdeploy_papers.psdr:PSDRConfig"
        MODELS.register(name, Entry(source, config, {"depth": 50}, summary), __name__)
    MODELS.register("lrbp-vgg16", _LOW_RANK_VGG, __name__)
    OPTIMIZERS.register("adahessian", _ADAHESSIAN, __name__)
    TEACHERS.register(JOINT, _JOINT_TEACHER, __name__)
    IMPORTERS.register("gmsop", _GMSOP, __name__)
    FIRST_BYTES[_GMSOP] = b"MATLAB "
