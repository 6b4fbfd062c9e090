import pytest
import torch

from sopdeploy import create_model, describe
from sopdeploy.errors import ConfigError
from sopdeploy.models.psdr import intermediate_widths

SMALL = {"depth": 18, "width": 16, "decay": 0.5}


@pytest.mark.parametrize(
    ("target", "decay", "widths"),
    [
        (64, 0.25, [1024, 256]),
        (128, 0.25, [1024, 256]),
        (64, 0.5, [1024, 512, 256, 128]),  # Fig. 3
        (128, 0.5, [1024, 512, 256]),
        (256, 0.5, [1024, 512]),
        (100, 0.3, [1024, 307]),
        (1024, 0.5, []),
    ],
)
def test_intermediate_widths_follow_eq_4(target: int, decay: float, widths: list[int]) -> None:
    assert intermediate_widths(2048, target, decay) == widths


@pytest.mark.parametrize(
    ("decay", "parameters", "macs"),
    [
        (0.25, 2_378_368, 465_633_280),
        (0.5, 2_797_440, 547_520_512),
    ],
)
def test_the_chain_is_exported_and_counted(decay: float, parameters: int, macs: int) -> None:
    """Nothing is published; the direct reduction has 131,200 parameters and 25,690,112 MACs."""
    with torch.device("meta"):
        chain = create_model("psdr-resnet50-no-aux", decay=decay).pooling.chain
    assert sum(p.numel() for p in chain.parameters()) == parameters
    found = describe("psdr-resnet50-no-aux", decay=decay).shipped
    backbone, fc = describe("resnet50", conv5_stride=1).shipped, (2080 + 1) * 1000
    assert found.parameters == backbone.parameters - 2049 * 1000 + parameters + fc
    assert found.macs - (backbone.macs - 2048 * 1000) - 2080 * 1000 == macs


@pytest.mark.parametrize(("decay", "heads"), [(0.25, 2), (0.5, 4)])
def test_every_step_but_the_last_has_a_training_only_head(decay: float, heads: int) -> None:
    found = describe("psdr-resnet50", decay=decay)
    assert found.training_only == ("auxiliary",)
    assert found.loss_weights == {"main": 1.0, **{f"step{n}": 1.0 for n in range(1, heads + 1)}}
    assert found.shipped == describe("psdr-resnet50-no-aux", decay=decay).training
    widths = intermediate_widths(2048, 64, decay)
    head_parameters = [c * 64 + 128 + 2081 * 1000 for c in widths]
    assert found.training.parameters - found.shipped.parameters == sum(head_parameters)


def test_a_target_width_without_reduction_is_rejected() -> None:
    with pytest.raises(ConfigError, match="width: 512 is not smaller than 512 channels"):
        create_model("psdr-resnet50", depth=18, width=512)
