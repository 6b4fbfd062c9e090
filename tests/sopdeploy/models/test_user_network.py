"""The papers' heads and methods on networks of the catalog, of timm and of the user."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sopdeploy
from sopdeploy.base.plugins import MODELS
from sopdeploy.errors import CheckpointError, ConfigError, DataError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.isqrt_cov import NewtonSchulzConfig
from sopdeploy.models.base import Classifier
from sopdeploy.models.describe import describe
from sopdeploy.models.registry import create_model
from sopdeploy.models.second_order_head import HeadConfig, SecondOrderHead, with_head
from sopdeploy.models.user_network import register_model
from tests.export.conftest import save
from tests.sopdeploy.layers.numerics.all_poolings import textbook_root

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


def test_a_network_that_no_paper_covers_gets_branches_of_two_blocks() -> None:
    inner = Stages()
    inner.late = nn.Sequential(nn.Conv2d(6, 300, 3))
    inner.fc = nn.Linear(300, 5)
    network = sopdeploy.dsop(inner, ["early", "late"], image_size=8)
    plans = [(plan.blocks, plan.width) for plan in network.plans.values()]

    assert plans == [(2, 6), (2, 256)]


def test_branches_train_the_network_and_leave_its_output_alone() -> None:
    inner = Stages().train()
    inner.early[1].eval()  # a frozen batch norm keeps its mode
    network = sopdeploy.dsop(inner, ["late", "early"], image_size=8, **THIN)

    assert inner.training is True
    assert inner.early[1].training is False
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
        (Stages(), ["middle"], {}, "'middle'.* early, late, fc"),
        (Stages(), ["fc"], {}, r"^taps: fc .*\(1, 5\)"),
        (Stages(), ["late"], {"image_size": 1}, "1 x 1 .*image_size"),
        (Stages(), ["late"], {"aux_width": 3}, r"^dsop: aux_width: .*aux_widths"),
        (Stages(), ["late"], THIN, "^aux_blocks: 2 values"),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), ["0"], {}, r"returns \(1, 4, 8, 8\)"),
    ],
)
def test_a_wrong_argument_is_one_line(
    network: Any, taps: Any, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sopdeploy.dsop(network, taps, **{"image_size": 8, **config})


def test_a_network_of_gray_images_gets_branches() -> None:
    inner = Stages()
    inner.early[0] = nn.Conv2d(1, 6, 3, padding=1)
    network = sopdeploy.dsop(inner, ["late"], image_size=8)

    assert network.eval()(torch.rand(2, 1, 8, 8)).shape == (2, 5)
    with pytest.raises(ConfigError, match="image_size"):
        sopdeploy.dsop(inner, ["late"], image_size=1)


def test_auxiliary_outputs_in_train_mode_are_refused() -> None:
    network = sopdeploy.dsop(Stages(tuples=True), ["late"], image_size=8)
    with pytest.raises(ConfigError, match="returns a tuple"):
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
    exported = sopdeploy.export(
        run.best, tmp_path / "out", detach=bool(training_only), max_batch=1
    )

    expected = "three-way" if training_only else "trained-plain"
    assert exported.certificate.proof == expected
    assert exported.certificate.detached == training_only
    assert exported.manifest.model == registered


def test_a_checkpoint_of_an_unregistered_network_is_one_line(
    registered: str, tmp_path: Path
) -> None:
    network = sopdeploy.create_model(registered)
    path = tmp_path / "ckpt.pt"
    save(network, registered, path, Preprocess(resize=8, crop=8))
    del MODELS.registered[registered]

    with pytest.raises(CheckpointError, match=r"'stages'"):
        sopdeploy.export(path, tmp_path / "again", detach=True)


def test_isqrt_replaces_what_follows_the_last_feature_map() -> None:
    inner = Stages().eval()
    model = sopdeploy.isqrt(inner, image_size=8, **METHODS["isqrt"][0]).double().eval()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    root = textbook_root(
        model.pooling.reduce(inner.late(inner.early(images))), NewtonSchulzConfig()
    )
    rows, columns = torch.triu_indices(*root.shape[1:])
    expected = model.fc(root[:, rows, columns])

    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-12)
    assert isinstance(inner.fc, nn.Identity), "the classifier is gone"


@pytest.mark.parametrize(
    ("name", "message"), [("resnet18", "of the catalog"), ("a/b", "letters, digits")]
)
def test_a_name_must_be_free_and_fit_a_folder(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sopdeploy.register_model(name, Stages)


EVERYTHING = HeadConfig(kind="gap+mean+isqrt", width=8)


class Small(nn.Module):
    """A network of a user: two convolutions, two linear layers."""

    def __init__(self, num_classes: int, after: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2)
        self.last = nn.Conv2d(6, 12, 3, stride=2)
        self.hidden = nn.Linear(12, 9)
        self.fc = nn.Linear(9, num_classes)
        self.after = after or nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        maps = self.last(self.first(images).relu()).relu()
        return self.after(self.fc(self.hidden(maps.mean(dim=(2, 3))).relu()))


class Unused(nn.Identity):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(9, num_classes)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(MODELS, "registered", {})
    return lambda build: register_model("mine", build, image_size=32)


def with_statistics(
    name: str, side: int, head: HeadConfig = EVERYTHING
) -> tuple[Classifier, Any, Tensor]:
    """Build *name* with and without *head*, and two images of *side* pixels."""
    torch.manual_seed(0)
    plain = create_model(name, num_classes=3).eval()
    return plain, with_head(name, plain, head), torch.randn(2, 3, side, side)


@pytest.mark.parametrize(
    ("name", "side", "maps"),
    [
        ("resnet8", 32, {"layer3.0": (64, 8)}),
        ("timm:test_efficientnet", 64, {"blocks.4": (64, 2)}),
        ("timm:test_vit", 160, {"blocks.5": (64, 10)}),
        ("timm:test_mambaout", 160, {"stages.3": (64, 5)}),
    ],
)
@torch.no_grad()
def test_the_vector_joins_the_networks_own_vector_the_means_and_the_roots(
    name, side, maps
) -> None:
    plain, network, images = with_statistics(name, side)
    own, found = network.head_inputs(images)
    assert {tap: tuple(values.shape) for tap, values in found.items()} == {
        tap: (2, channels, size, size) for tap, (channels, size) in maps.items()
    }
    linear = plain.logits_layer()
    assert linear is not None
    assert torch.allclose(linear(own), plain(images), atol=1e-6)

    vector = network.pooled_head.vector(own, found)
    (values,) = found.values()
    assert torch.equal(vector[:, : own.shape[1]], own)
    assert torch.equal(vector[:, own.shape[1] : -36], values.mean(dim=(2, 3)))
    assert vector[:, -36:].shape == (2, 8 * 9 // 2)
    assert torch.equal(network.pooled_head.fc(vector), network(images))


@pytest.mark.parametrize(
    ("kind", "length"),
    [
        ("gap", 64),
        ("isqrt", 36),
        ("gap+isqrt", 100),
        ("gap+mean", 128),
        ("gap+mean+isqrt", 164),
    ],
)
@torch.no_grad()
def test_every_head_of_a_recipe_has_its_vector_and_its_distance(kind: Any, length: int) -> None:
    """No procedure fits some of them, but loops of earlier versions have written checkpoints with all."""
    head = HeadConfig(kind=kind, width=8, distance=True)
    _, network, images = with_statistics("resnet8", 32, head)
    vector = network.pooled_head.vector(*network.head_inputs(images))

    assert network.num_features == vector.shape[1] == length + 1
    assert torch.allclose(vector[:, -1], vector[:, :-1].norm(dim=1))


@pytest.mark.parametrize(
    "name", ["resnet8", "vgg16", "timm:test_convnext", "timm:deit_tiny_distilled_patch16_224"]
)
def test_the_tensors_of_the_network_keep_their_names(name: str) -> None:
    with torch.device("meta"):
        plain = create_model(name, num_classes=3)
        network = create_model(f"head:{name}", num_classes=3)
    kept = {key for key in network.state_dict() if not key.startswith("pooled_head.")}
    gone = {key.rpartition(".")[0] for key in plain.state_dict().keys() - kept}

    assert kept <= plain.state_dict().keys()
    assert gone in ({"fc"}, {"classifier.6"}, {"head.fc"}, {"head", "head_dist"})


def test_branches_are_not_part_of_a_network_with_a_head() -> None:
    for name, message in (
        ("gmsop-16-8-resnet18", "a network without them$"),
        ("head:resnet8", "has this head"),
    ):
        with pytest.raises(ConfigError, match=message):
            create_model(f"head:{name}")

    trained = create_model("dsop-resnet8", num_classes=3).eval()
    network = with_head("dsop-resnet8", trained, HeadConfig(kind="gap"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        own, maps = network.head_inputs(images)
        assert maps == {}
        assert torch.equal(trained.fc(own), trained(images))


@torch.no_grad()
def test_the_projection_is_that_to_the_principal_components_of_all_batches() -> None:
    _, network, _ = with_statistics("resnet8", 32, HeadConfig(width=5))
    scales = torch.arange(1.0, 65.0)[:, None, None]
    batches = [torch.randn(3, 64, 4, 4) * scales + 100 for _ in range(4)]
    network.pooled_head.fit_projection([{"layer3.0": part} for part in batches])
    rows = torch.cat(batches).permute(0, 2, 3, 1).flatten(end_dim=2).double()
    _, _, components = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    weight = network.pooled_head.pooling("layer3.0").layer_reduce.weight[:, :, 0, 0].double()

    assert torch.allclose(
        (weight @ components[:5].T).abs(), torch.eye(5, dtype=torch.float64), atol=1e-5
    )
    with pytest.raises(DataError, match="not finite"):
        network.pooled_head.fit_projection([{"layer3.0": torch.full((1, 64, 2, 2), torch.nan)}])

    _, widest, _ = with_statistics("resnet8", 32, HeadConfig(width=64))
    widest.pooled_head.fit_projection([{"layer3.0": batches[0]}])  # there is none to set


def test_a_network_of_the_user_has_a_head_on_chosen_maps(register) -> None:
    register(Small)
    plain = create_model("mine", num_classes=3).eval()
    network = with_head("mine", plain, HeadConfig(width=4))

    assert isinstance(network, SecondOrderHead)
    assert network.maps == {"last": 12}

    images = torch.randn(2, 3, 32, 32)
    own, _ = network.head_inputs(images)
    assert torch.equal(plain.network.fc(own), plain(images))

    two = create_model("head:mine", num_classes=3, head={"taps": ("last", "first"), "width": 4})
    assert two.maps == {"first": 6, "last": 12}
    assert torch.equal(two.eval().heads(images)["main"], two(images))
    # On the device `meta`
    assert describe("head:mine", num_classes=3).representation == 9 + 12 * 13 // 2


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (lambda n: Small(n, nn.Softmax(dim=1)), {}, "last linear layer"),
        (lambda n: Small(n, Unused(n)), {}, "after.fc"),
        (
            lambda n: Small(n, nn.MaxPool1d(1, return_indices=True)),
            {"kind": "gap"},
            "not return .* fc",
        ),
        (Small, {"taps": ("middle",)}, "no module 'middle'"),
        (Small, {"taps": ("hidden",)}, r"hidden .*\(1, 9\)"),
        (Small, {"taps": ()}, "head.taps: "),
        (lambda n: nn.Sequential(nn.Flatten(), nn.Linear(3072, n)), {}, "feature map"),
        (
            lambda n: nn.Sequential(nn.Conv2d(3, n, 32), nn.Flatten()),
            {"kind": "gap"},
            "not linear",
        ),
    ],
)
def test_networks_that_cannot_have_a_head_are_refused_in_one_line(
    register, build, options, message
) -> None:
    register(build)
    with pytest.raises(ConfigError, match=message):
        create_model("head:mine", num_classes=3, head=options)
