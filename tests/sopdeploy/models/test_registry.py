import re

import pytest
import torch

from sopdeploy import create_model, list_models
from sopdeploy.errors import ConfigError
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import entry, make_config


@pytest.mark.parametrize("name", list_models())
def test_every_name_builds_a_network_and_its_inference_model(name: str) -> None:
    with torch.device("meta"):
        network = create_model(name, num_classes=3)
        plain = network.inference_model()
    assert isinstance(network, Classifier)
    assert network.num_classes == 3
    assert network.num_features() > 0
    removed = network.state_dict().keys() - plain.state_dict().keys()
    assert all(key.startswith(network.training_only) for key in removed)
    assert plain.state_dict().keys() <= network.state_dict().keys()
    assert network.loss_weights()["main"] > 0


@pytest.mark.parametrize("name", list_models())
def test_every_entry_is_complete_and_its_config_survives_a_checkpoint(name: str) -> None:
    config, line = make_config(name, {}), entry(name)
    assert make_config(name, config.model_dump(mode="json")) == config
    assert not type(config).model_fields.keys() & {"name", "num_classes", "image_size"}  # of `describe`
    assert line.summary
    assert line.image_size >= 8
    assert line.num_classes >= 2


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("resnet19", "resnet18"), ("dsop_resnet18", "dsop-resnet18"), ("dsop-resnet5", "dsop-resnet50")],
)
def test_a_misspelled_name_suggests_the_nearest_ones(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{wrong}' is not in the catalog; did you mean .*{near}"):
        create_model(wrong)


def test_an_unknown_name_points_to_the_list() -> None:
    with pytest.raises(ConfigError, match="lists them all"):
        create_model("xyzzy")


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("resnet18", {"dept": 18}, "resnet18: dept: unknown key; its keys are depth, conv5_stride"),
        ("resnet18", {"conv5_stride": 3}, "conv5_stride: Input should be 1 or 2 (got '3')"),
        ("resnet20", {"depth": 21}, "depth must be 6n + 2"),
        ("dsop-resnet18", {"main_weight": float("nan")}, "main_weight"),
        ("resnet18", {"num_classes": 0}, "num_classes: must be at least 1 (got 0)"),
    ],
)
def test_an_invalid_value_is_a_one_line_error(name: str, config: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        create_model(name, **config)
    assert "\n" not in str(caught.value)
