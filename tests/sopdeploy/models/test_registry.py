"""The catalog, and one table of small networks: the inference model equals eval mode, all weights learn."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sopdeploy.errors import ConfigError
from sopdeploy.models.backbones import resnet
from sopdeploy.models.base import Classifier, TrainingOutput
from sopdeploy.models.registry import create_model, entry, list_models, make_config
from tests.sopdeploy.training.small_recipes import few_blocks
from tests.support.slow import mostly_slow
from tests.sweep.smallest import ALL, VARIANTS


@pytest.mark.parametrize("name", list_models())
def test_every_entry_is_complete_and_its_config_survives_a_checkpoint(name: str) -> None:
    config = make_config(name, {})
    line = entry(name)

    assert make_config(name, config.model_dump(mode="json")) == config
    # Of `describe`
    assert not type(config).model_fields.keys() & {"name", "num_classes", "image_size"}
    assert line.summary
    assert line.image_size >= 8
    assert line.num_classes >= 2


@pytest.mark.parametrize("name", list_models())
def test_every_entry_is_built_also_without_what_only_training_uses(name: str) -> None:
    with torch.device("meta"):
        network = create_model(name, num_classes=3)
        inference = network.inference_model()
    assert all(parameter.is_meta for parameter in inference.parameters())


def test_the_classes_of_a_network_with_a_head_are_made_once() -> None:
    one = entry("head:resnet18")
    again = entry("head:resnet18")

    assert (one.network, one.config) == (again.network, again.config)
    assert entry("head:resnet8").network is not one.network


def test_a_file_in_place_of_a_name_is_told_what_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt.pt").write_bytes(b"")

    with pytest.raises(ConfigError, match=r"sopdeploy eval"):
        create_model("ckpt.pt")


def test_an_unknown_name_points_to_the_list() -> None:
    with pytest.raises(ConfigError, match="lists them all"):
        create_model("xyzzy")


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("resnet18", {"dept": 18}, "resnet18: dept: "),
        ("resnet18", {"conv5_stride": 3}, "conv5_stride: "),
        ("resnet20", {"depth": 21}, "depth must be 6n + 2"),
        ("dsop-resnet18", {"main_weight": float("nan")}, "main_weight"),
        ("resnet18", {"num_classes": 0}, "num_classes: "),
    ],
)
def test_an_invalid_value_is_a_one_line_error(name: str, config: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        create_model(name, **config)
    assert "\n" not in str(caught.value)


NETWORKS = {f"{small.name}-{n}": small for n, small in enumerate([*ALL, *VARIANTS])}
QUICK_NETWORKS = ("resnet8", "dsop-resnet8", "gsop-net1-resnet26", "gmsop-16-8-resnet18")
# The first case of each
QUICK = [
    next(case for case in NETWORKS if case.startswith(f"{name}-")) for name in QUICK_NETWORKS
]


@pytest.mark.parametrize("case", mostly_slow(NETWORKS, *QUICK))
def test_a_step_reaches_every_parameter_and_inference_equals_eval_mode(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    small = NETWORKS[case]
    few_blocks(monkeypatch)
    monkeypatch.setitem(resnet.BLOCKS, 50, (2, 1, 1, 1))
    network = small.build().double()
    images = torch.randn(3, 3, small.side, small.side).double()

    assert_a_step_reaches_every_parameter(
        network, images, 0.45 if "timm" in small.name else 0.9
    )

    plain = network.inference_model().double().eval()
    ours = {tensor.data_ptr() for tensor in network.state_dict().values()}
    assert ours.isdisjoint(tensor.data_ptr() for tensor in plain.state_dict().values())

    removed = tuple(f"{part}." for part in network.training_only)
    kept = {
        key: value for key, value in network.state_dict().items() if not key.startswith(removed)
    }

    assert list(kept) == list(plain.state_dict())

    plain.load_state_dict(kept)
    network.eval()
    with torch.no_grad():
        together = network(images)
        assert torch.equal(together, plain(images))
        apart = torch.cat([network(image[None]) for image in images])

    torch.testing.assert_close(apart, together, rtol=1e-9, atol=1e-9)


def assert_a_step_reaches_every_parameter(
    network: Classifier, images: Tensor, share: float
) -> None:
    """Check outputs and gradients; timm scales residuals by 0 at first, so a *share* is not 0."""
    out = network(images)
    assert isinstance(out, TrainingOutput) == bool(network.training_only)
    if not isinstance(out, TrainingOutput):
        out = TrainingOutput(out, {}, {})
    assert {logits.shape for logits in (out.logits, *out.branches.values())} == {(3, 3)}
    assert out.branches.keys() | {"main"} == network.loss_weights().keys()
    terms = [out.logits, *out.branches.values(), *out.penalties.values()]
    sum(term.square().sum() for term in terms).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    moved = [bool(p.grad.any()) for p in network.parameters()]
    assert sum(moved) > share * len(moved)
