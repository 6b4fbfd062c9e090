"""The network summary lists exported and training-only modules with their costs."""

import pytest

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.describe import describe
from sopdeploy.models.registry import entry, make_config
from sopdeploy_export.report.network_summary import NetworkSummary, summarize_checkpoint


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


@pytest.mark.parametrize(
    ("name", "removed"),
    [
        ("dsop-resnet8", ["branches.layer1_0", "branches.layer2_0", "branches.layer3_0"]),
        ("psdr-resnet50", ["auxiliary.step1", "auxiliary.step2"]),
        ("gsop-net1-resnet26", []),
    ],
)
def test_the_modules_add_up_to_all_parameters_and_multiply_adds(name: str, removed: list[str]) -> None:
    found, counted = summary_of(name), describe(name)
    assert [part.name for part in found.parts if part.training_only] == removed
    assert (found.trained, found.shipped) == (counted.training, counted.shipped)
    assert sum(part.parameters for part in found.parts) == found.trained.parameters
    assert sum(part.macs for part in found.parts) == found.trained.macs
    assert sum(part.parameters for part in found.parts if not part.training_only) == found.shipped.parameters


def test_a_network_that_cannot_train_is_counted_in_eval_mode() -> None:
    found = summary_of("gmsop-16-8-resnet18", chosen=1)
    assert [part.name for part in found.parts if part.training_only] == ["gate.noise"]
