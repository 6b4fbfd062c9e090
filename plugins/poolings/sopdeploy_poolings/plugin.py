"""Registers the poolings and the network of this package. pyproject.toml names this module."""

import sopdeploy
from sopdeploy_poolings.codebook import NetFVConfig, NetVLADConfig
from sopdeploy_poolings.dropcov import DropCovConfig
from sopdeploy_poolings.low_rank import low_rank_vgg16
from sopdeploy_poolings.sketch import CompactBilinearConfig, KernelPoolingConfig

for config in (CompactBilinearConfig, KernelPoolingConfig, NetVLADConfig, NetFVConfig, DropCovConfig):
    sopdeploy.register_pooling(config)
sopdeploy.register_model("lrbp-vgg16", low_rank_vgg16)
