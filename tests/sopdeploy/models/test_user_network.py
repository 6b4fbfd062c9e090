"""The papers' methods on networks of the user, and their names for training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sopdeploy
from sopdeploy.errors import CheckpointError, ConfigError
from sopdeploy.plugins import MODELS
from tests.sweep.steps import save

THIN: dict[str, Any] = {"aux_blocks": (1, 1), "aux_widths": (3, 4)}


class Stages(nn.Module):
    """Two stages and a classifier."""

    def __init__(self, classes: int = 5, *, tuples: bool = False) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, classes)
        self.tuples = tuples

    def forward(self, images: Tensor) -> Any:
        logits = self.fc(self.late(self.early(images)).mean((2, 3)))
        return (logits, logits) if self.tuples and self.training else logits


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(MODELS, "registered", {})
    sopdeploy.register_model("stages", Stages, taps=["early", "late"], image_size=8)
    return "stages"


def test_branches_train_the_network_and_leave_its_output_alone() -> None:
    inner = Stages().train()
    inner.early[1].eval()  # a frozen batch norm keeps its mode
    network = sopdeploy.dsop(inner, ["late", "early"], image_size=8, **THIN)
    assert (inner.training, inner.early[1].training) == (True, False)
    assert list(network.branches) == ["early", "late"], "in the order of computation"
    assert [branch.pooling.width for branch in network.branches.values()] == [3, 4]
    images = torch.rand(2, 3, 8, 8)
    output = network(images)
    sum(logits.sum() for logits in output.branches.values()).backward()
    assert all(parameter.grad is not None for parameter in inner.early.parameters())
    assert inner.fc.weight.grad is None
    assert torch.equal(network.eval()(images), inner.eval()(images))
    assert not any(part._forward_hooks for part in network.modules())


@pytest.mark.parametrize(
    ("network", "taps", "config", "message"),
    [
        (Stages(), ["middle"], {}, r"no module 'middle'; it has early, late, fc"),
        (Stages(), ["fc"], {}, r"^taps: fc gives \(1, 5\), not a feature map"),
        (Stages(), ["late"], {"image_size": 1}, r"fails for an image of 3 x 1 x 1 .*image_size"),
        (Stages(), ["late"], {"aux_width": 3}, r"^dsop: aux_width: unknown key; its keys are .*aux_widths"),
        (Stages(), ["late"], THIN, r"^aux_blocks: 2 values for 1 stages"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), ["0"], {}, r"returns \(1, 4, 8, 8\) for one image"),
    ],
)
def test_a_wrong_argument_is_one_line(network: Any, taps: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sopdeploy.dsop(network, taps, **{"image_size": 8, **config})


def test_auxiliary_outputs_in_train_mode_are_refused() -> None:
    network = sopdeploy.dsop(Stages(tuples=True), ["late"], image_size=8)
    with pytest.raises(ConfigError, match=r"returns a tuple in train mode, not logits"):
        network(torch.rand(2, 3, 8, 8))


METHODS: dict[Any, tuple[dict[str, Any], tuple[str, ...]]] = {
    "dsop": ({"aux_blocks": [1, 0], "aux_widths": [3, 3]}, ("branches",)),
    "isqrt": ({"pooling": {"kind": "isqrt", "width": 4}}, ()),
}


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("method", METHODS)
def test_a_registered_network_is_trained_and_exported_with_proof(
    registered: str, tmp_path: Path, method: Any
) -> None:
    config, training_only = METHODS[method]
    taps = ["early", "late"] if method == "dsop" else []
    sopdeploy.register_model(registered, Stages, taps=taps, image_size=8, method=method)
    run = sopdeploy.train(
        recipe="digits-dsop", out=tmp_path / "run", epochs=1, batch_size=256,
        model={"name": registered, "config": config}, preprocess={"resize": 8, "crop": 8},
    )  # fmt: skip
    assert run.training_only == training_only
    exported = sopdeploy.export(run.best, tmp_path / "out", detach=bool(training_only), max_batch=1)
    assert (exported.certificate.proof, exported.certificate.detached) == (
        "three-way" if training_only else "trained-plain",
        training_only,
    )
    assert exported.manifest.model == registered


def test_a_checkpoint_of_an_unregistered_network_is_one_line(registered: str, tmp_path: Path) -> None:
    save(sopdeploy.create_model(registered), registered, 8, tmp_path / "ckpt.pt")
    del MODELS.registered[registered]
    with pytest.raises(CheckpointError, match=r"model 'stages' is not in the catalog"):
        sopdeploy.export(tmp_path / "ckpt.pt", tmp_path / "again", detach=True)


def root(maps: Tensor) -> Tensor:
    """Compute the triangle of the root of the covariance by five Newton-Schulz steps as in the paper."""
    y, size = torch.stack([x.cov(correction=0) for x in maps.flatten(2)]), maps.shape[1]
    trace, eye = y.diagonal(dim1=1, dim2=2).sum(1)[:, None, None], torch.eye(size, dtype=y.dtype)
    y, z = y / trace, eye
    for _ in range(5):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    rows, columns = torch.triu_indices(size, size)
    return (y * trace.sqrt())[:, rows, columns]


def test_isqrt_replaces_what_follows_the_last_feature_map() -> None:
    inner = Stages().eval()
    model = sopdeploy.isqrt(inner, image_size=8, **METHODS["isqrt"][0]).double().eval()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    expected = model.fc(root(model.pooling.reduce(inner.late(inner.early(images)))))
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-12)
    assert isinstance(inner.fc, nn.Identity), "the classifier is gone"


@pytest.mark.parametrize(("name", "message"), [("resnet18", "of the catalog"), ("a/b", "letters, digits")])
def test_a_name_must_be_free_and_fit_a_folder(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sopdeploy.register_model(name, Stages)


def test_a_builder_that_fails_is_one_line(registered: str) -> None:
    sopdeploy.register_model(registered, lambda classes: 1 / 0)
    with pytest.raises(
        ConfigError, match=r"^stages: cannot be built \(ZeroDivisionError: division by zero\)"
    ):
        sopdeploy.create_model(registered)
    sopdeploy.register_model(registered, lambda classes: Stages(), taps=["late"], image_size=8)
    with pytest.raises(ConfigError, match=r"the network returns 5 logits for 7 classes"):
        sopdeploy.create_model(registered, num_classes=7)
