"""The costs of a network in the report of an export."""

import pytest

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.describe import describe
from sopdeploy.models.registry import entry, make_config
from sopdeploy_export.subject import NetworkSummary, summarize_checkpoint


def summary_of(name: str, **config: object) -> NetworkSummary:
    usual = entry(name)
    return summarize_checkpoint(
        Checkpoint(
            model=name,
            config=make_config(name, config).model_dump(mode="json"),
            weights={},
            labels=tuple(map(str, range(usual.num_classes))),
            preprocess=Preprocess(resize=usual.image_size, crop=usual.image_size),
            training={},
        )
    )


@pytest.mark.parametrize("name", ["dsop-resnet8", "psdr-resnet50", "gsop-net1-resnet26"])
def test_the_costs_are_those_of_describe(name: str) -> None:
    found, counted = summary_of(name), describe(name)
    assert (found.trained, found.shipped) == (counted.training, counted.shipped)


def test_a_network_that_cannot_train_is_counted_in_eval_mode() -> None:
    assert summary_of("gmsop-16-8-resnet18", chosen=1).trained.macs > 0
