"""Registers what training needs. pyproject.toml names this module."""

import sopdeploy
from sopdeploy_example.pooling import StdConfig, std_resnet8
from sopdeploy_example.stripes import StripesConfig

sopdeploy.register_pooling(StdConfig)
sopdeploy.register_model("std-resnet8", std_resnet8, image_size=32)
sopdeploy.register_data_source(StripesConfig)
