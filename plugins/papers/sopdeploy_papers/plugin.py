"""The names that this package adds to sopdeploy; what they stand for is imported when it is used."""

from sopdeploy.models.registry import Entry
from sopdeploy.plugins import IMPORTERS, MODELS, POOLINGS

_POOLINGS = {
    "cbp": "sketch:CompactBilinearConfig",
    "kernel": "sketch:KernelPoolingConfig",
    "netvlad": "codebook:NetVLADConfig",
    "netfv": "codebook:NetFVConfig",
    "dropcov": "dropcov:DropCovConfig",
}
_LOW_RANK = "sopdeploy_papers.poolings.low_rank:LowRankVGG"
for _name, _config in _POOLINGS.items():
    POOLINGS.register(_name, f"sopdeploy_papers.poolings.{_config}", __name__)
_entry = Entry(_LOW_RANK, "sopdeploy.config:StrictModel", {}, "VGG-16 with low-rank bilinear pooling")
MODELS.register("lrbp-vgg16", _entry, __name__)
IMPORTERS.register("gmsop", "sopdeploy_papers.gmsop_weights:IMPORTER", __name__)
