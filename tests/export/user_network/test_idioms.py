"""Networks as tutorials write them are exported with proof, or refused for a reason that the pages list."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sopdeploy.errors import ConfigError, LoweringError, SopdeployError
from sopdeploy_export.options import ExportOptions
from tests.export.once import proving_once
from tests.export.user_network import idioms, networks
from tests.support.slow import mostly_slow

QUICK, RANGE = ExportOptions(max_batch=1), ExportOptions()
ANEW = "average pooling with ceil_mode"  # without a cache of graphs
# Whose operators can depend on the number of images
BY_SIZE = (
    "view behind a convolution",
    "view of the shape",
    "view of a batch and the rest",
    "flatten",
    "reshape",
    "a view that needs channels last",
    "sizes by unpacking",
    "a layer of a transformer",
    ANEW,
    "attention between views",
    "flatten of tokens",
    "instance norm with running statistics",
    "stacks of rows, columns and depths",
    "an assignment by a mask",
    "a mask of the image",
    "a mask of each head",
)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "case",
    mostly_slow(
        idioms.EXPORTED,
        "a dict",
        "a hook that scales features",
        "a GSoP block of positions",
        "a table that the first run makes",
    ),
)
def test_it_is_exported_with_proof(case: str, tmp_path: Path) -> None:
    build, options, proof = idioms.EXPORTED[case]
    network = networks.trained(build())
    options = {"options": RANGE if case in BY_SIZE else QUICK} | options
    with nullcontext() if case == ANEW else proving_once(alone=True):
        exported = networks.export_small(network, tmp_path, **options)

    assert exported.certificate.proof == proof
    assert exported.certificate.mixes_images == ()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "case", mostly_slow(idioms.REFUSED, "len of a batch", "statistics that diverged")
)
def test_it_is_refused_in_one_line_that_names_the_remedy(case: str, tmp_path: Path) -> None:
    build, options, message = idioms.REFUSED[case]
    network: nn.Module = build().eval()
    with pytest.raises(SopdeployError, match=message) as error:
        networks.export_small(network, tmp_path, **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_plain_network_that_never_ran_makes_its_table(tmp_path: Path) -> None:
    network = idioms.Distances().eval()
    network(torch.zeros(1, 3, networks.SIDE, networks.SIDE))
    exported = networks.export_small(network, tmp_path, plain=idioms.Distances, options=QUICK)
    assert exported.certificate.proof == idioms.PLAIN


def test_a_table_that_was_kept_of_other_weights_is_refused(tmp_path: Path) -> None:
    network: Any = networks.trained(idioms.KeepsTable())
    with torch.no_grad():
        network(torch.zeros(1, 3, networks.SIDE, networks.SIDE))
    network.fc.weight.data += 1

    with pytest.raises(LoweringError, match=r"parameter or buffer"):
        networks.export_small(network, tmp_path, plain=idioms.KeepsTable, options=QUICK)


def vision_transformer() -> nn.Module:
    library = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    config = library.ViTConfig(
        **sizes, image_size=networks.SIDE, patch_size=4, num_labels=networks.CLASSES
    )
    network: nn.Module = library.ViTForImageClassification(config)
    return network


def adapted() -> nn.Module:
    library = pytest.importorskip("peft")
    config = library.LoraConfig(target_modules="all-linear", r=4)
    network: nn.Module = library.get_peft_model(vision_transformer(), config)
    return network


def with_metric() -> nn.Module:
    lightning, metrics = (
        pytest.importorskip("lightning.pytorch"),
        pytest.importorskip("torchmetrics"),
    )

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = networks.Small(aux=False)
            self.accuracy = metrics.Accuracy(task="multiclass", num_classes=networks.CLASSES)

        def forward(self, images: Tensor) -> Any:
            return self.model(images)

    return Module()


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("build", "logits_key"),
    [(vision_transformer, "logits"), (adapted, "logits"), (with_metric, None)],
)
def test_networks_of_other_libraries_are_exported(
    build: Callable[[], nn.Module], logits_key: str | None, tmp_path: Path
) -> None:
    exported = networks.export_small(build().eval(), tmp_path, logits_key=logits_key)
    assert exported.certificate.proof == "trained-only"


def test_an_invalid_option_is_named_as_by_the_command_line() -> None:
    with pytest.raises(ConfigError, match=r"max_drop: .*'inf'"):
        ExportOptions(max_drop=float("inf"))
    with pytest.raises(ConfigError, match=r"max_drop: .*evaluate"):
        ExportOptions(precision="fp16", max_drop=0.1)
