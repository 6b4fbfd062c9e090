"""Start weights: published files from a loopback server and a cache, weight files, checkpoints."""

import hashlib
import io
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from huggingface_hub import close_session, constants
from torch import nn

from sopdeploy.data.sources import open_data
from sopdeploy.errors import ConfigError, SopdeployError, WeightsError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.settings.recipe import LoopRecipe, read_recipe
from sopdeploy.training.start_weights import (
    InitialModel,
    StartWeights,
    classifier_name,
    complete_preprocess,
    create_initial_model,
    load_start_weights,
)
from sopdeploy.training.train import train_recipe
from sopdeploy.weights.checkpoint import read_checkpoint
from sopdeploy.weights.files import check_is_weights
from sopdeploy.weights.import_weights import import_weights
from sopdeploy.weights.published import PACKAGES
from sopdeploy.weights.tensor_files import load_plain
from sopdeploy.weights.timm_files import LITE
from sopdeploy_commands.train_request import TrainOptions, configure, read_changes
from tests.sopdeploy.training.runs import short_recipe


class WeightServer(ThreadingHTTPServer):
    """Serves `content` with the hub's headers at every path of a loopback address; `requests` lists them.

    An "interrupted" response ends in the middle, a "changed" one has one other byte.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.fault, self.address = (
            b"",
            "none",
            f"http://127.0.0.1:{self.server_port}",
        )
        self.requests: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: WeightServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        content, fault = self.server.content, self.server.fault
        self.server.requests.append(f"{self.command} {self.path}")
        self.send_response(404 if fault == "not found" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()
        sent = {
            "interrupted": content[: len(content) // 2],
            "changed": content[:-1] + bytes([content[-1] ^ 1]) if content else b"",
            "not found": b"",
        }
        if self.command == "GET":
            self.wfile.write(sent.get(fault, content))
            self.close_connection = True

    def do_GET(self) -> None:
        self.do_HEAD()


BASE = 16  # channels of the first stage
LABELS = ("cup", "dog", "leaf")
ONE_PROCESS = Strategy(torch.device("cpu"))
RESNET18 = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.value


def content_of(network: torch.nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def resnet18() -> bytes:
    """The bytes of a file with torchvision's layout for a narrow ResNet-18, with random weights."""
    torch.manual_seed(1)
    return content_of(create_model("resnet18", num_classes=1000, base_width=BASE))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightServer]:
    """A server in place of torchvision's and timm's, and empty caches in `tmp_path`."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with WeightServer() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        template = f"{running.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running
        close_session()
        running.shutdown()
        thread.join()


def publish(server: WeightServer, content: bytes, monkeypatch: pytest.MonkeyPatch) -> str:
    """Serve *content* as torchvision's ResNet-18; return the file name, which has its hash."""
    server.content = content
    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    monkeypatch.setattr(RESNET18, "url", f"{server.address}/models/{name}")
    return name


def start(*settings: str) -> InitialModel:
    return create_initial_model(read_recipe("photos", settings), LABELS, ONE_PROCESS)


BACKBONE = {"conv1.weight", "bn1.running_var", "layer4.1.conv2.weight"}

NETWORKS = [
    ("dsop-resnet18", ("branches", "fc")),
    ("isqrt-resnet50", ("pooling", "fc")),
    ("resnet18", ("fc",)),
    ("head:resnet18", ("pooled_head",)),
    ("gsop-net1-resnet50", tuple(f"layer{s}.1.attention" for s in range(1, 5))),
]


@pytest.mark.parametrize(("model", "new"), NETWORKS, ids=[model for model, _ in NETWORKS])
def test_torchvision_weights_are_downloaded_once_and_fill_the_backbone(
    server, resnet18, monkeypatch, tmp_path, model, new
) -> None:
    name = publish(server, resnet18, monkeypatch)
    pooling = ', pooling={kind="isqrt", width=8}' if model == "isqrt-resnet50" else ""
    settings = f"model.name={model}", f"model.config={{depth=18, base_width={BASE}{pooling}}}"
    initial = start(*settings)

    assert (tmp_path / "torch" / "hub" / "checkpoints" / name).read_bytes() == resnet18

    given = load_plain(Path(name), resnet18)
    own = initial.model.state_dict()
    assert all(torch.equal(own[tensor], given[tensor]) for tensor in BACKBONE)
    assert initial.start is not None
    assert set(new) <= set(initial.start.new) <= {*new, "fc", "pooling", "pooled_head.fc"}

    unused = ("fc",) if model.startswith("head:") else ()
    assert (initial.start.file, initial.start.unused) == (name, unused)
    assert (initial.recipe.preprocess.resize, initial.recipe.preprocess.crop) == (256, 224)

    server.fault = "not found"  # the second run needs no server
    assert start(*settings).start == initial.start
    assert server.requests == [f"GET /models/{name}"]


# with a class token, patches of 16 pixels and 100 position embeddings
VIT = "timm:test_vit.r160_in1k"


@pytest.mark.parametrize("stored", [96, 160])
@pytest.mark.parametrize("crop", [None, 64, 160])
def test_a_network_with_position_embeddings_takes_the_size_of_its_weights(
    tmp_path: Path, stored: int, crop: int | None
) -> None:
    given = create_model(VIT, num_classes=5, image_size=stored).state_dict()
    torch.save(given, tmp_path / "test_vit.pth")
    settings = () if crop is None else (f"preprocess.crop={crop}",)
    initial = start(f"model.name={VIT}", f"start.weights={tmp_path}/test_vit.pth", *settings)
    side, own = crop or stored, initial.model.state_dict()["pos_embed"]

    assert initial.recipe.preprocess.crop == initial.model.fixed_size == side
    assert initial.model(torch.zeros(1, 3, side, side)).shape == (1, len(LABELS))
    assert torch.equal(own[:, 0], given["pos_embed"][:, 0])  # of the class token
    if side == stored:
        assert torch.equal(own, given["pos_embed"])
    else:
        torch.testing.assert_close(
            own[:, 1:].mean(), given["pos_embed"][:, 1:].mean(), atol=2e-3, rtol=0
        )


@pytest.mark.parametrize("fault", ["interrupted", "changed", "not found"])
def test_a_failed_download_is_one_line_and_leaves_nothing(
    server, resnet18, monkeypatch, tmp_path, fault
) -> None:
    name = publish(server, resnet18, monkeypatch)
    server.fault = fault
    with pytest.raises(WeightsError) as error:
        start("model.name=resnet18")

    place = (
        f"get http://.*/models/{name} and put it at {tmp_path}/torch/hub/checkpoints/{name}$"
    )
    expected = (
        place
        if fault == "not found"
        else f"{name}: removed, because its SHA-256 is .*, not {name[9:17]}"
    )

    assert re.search(expected, str(error.value))
    assert "\n" not in str(error.value)

    if fault == "not found":
        error.value.__cause__.close()
    assert [path for path in (tmp_path / "torch").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("name", "hub"), [("test_efficientnet.pth", None), ("a.pth", "test_efficientnet")]
)
def test_a_weight_file_determines_the_network_that_is_not_named(tmp_path, name, hub) -> None:
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / name)
    if hub is not None:
        (tmp_path / "config.json").write_text(json.dumps({"architecture": hub}))

    for settings, network in (
        ((), "timm:test_efficientnet"),
        (("model.name=resnet18",), "resnet18"),
    ):
        options = TrainOptions(pretrained=str(tmp_path / name), set=settings)
        assert configure(read_changes(Path("photos"), None, options))[0].model.name == network


@pytest.mark.parametrize(
    "model",
    [
        "efficientnet-lite0",
        "head:efficientnet-lite0",
        "timm:tf_efficientnet_lite0",
        "timm:tf_efficientnet_lite0.in1k",
        "dsop-timm:tf_efficientnet_lite0",
        "head:dsop-timm:tf_efficientnet_lite0",
        "gsop-net1-efficientnet-lite0",
        "gsop-net2-efficientnet-lite0",
        "gmsop-4-2-efficientnet-lite0",
        "gmsop-head:efficientnet-lite0",
    ],
)
def test_every_name_of_a_packaged_network_finds_its_weights_without_a_hub(
    server, model
) -> None:
    start_report = start(f"model.name={model}").start
    assert start_report is not None
    assert (start_report.file, start_report.loaded) == ("efficientnet-lite0-57934424.pth", 294)
    assert start_report.preprocess == LITE["efficientnet-lite0"]
    assert server.requests == []


def test_a_package_whose_weights_were_changed_is_refused(server, monkeypatch) -> None:
    [(repository, packaged)] = PACKAGES.items()
    monkeypatch.setitem(PACKAGES, repository, packaged._replace(sha256="0" * 64))
    with pytest.raises(WeightsError, match=r"efficientnet-lite0"):
        start()


def test_the_default_network_starts_from_timms_lite0_and_needs_no_timm(
    server, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("sopdeploy.weights.published.PACKAGES", {})
    torch.manual_seed(2)
    given = create_model("efficientnet-lite0").state_dict()
    server.content = safetensors.torch.save(given)
    initial = start()
    own = initial.model.state_dict()
    new = [name for name, tensor in given.items() if not torch.equal(own[name], tensor)]

    assert new == ["classifier.weight", "classifier.bias"]
    assert (
        "/timm/tf_efficientnet_lite0.in1k/resolve/main/model.safetensors" in server.requests[-1]
    )

    published = Preprocess.from_timm(timm.get_pretrained_cfg("tf_efficientnet_lite0").to_dict())
    # The recipe's
    assert initial.recipe.preprocess == published.model_copy(update={"decoding": "fast"})
    assert LITE["efficientnet-lite2"] == Preprocess.from_timm(
        timm.get_pretrained_cfg("tf_efficientnet_lite2").to_dict()
    )

    # A file of the cache with other weights is refused.
    [blob] = (tmp_path / "hub").rglob("blobs/*")
    blob.write_bytes(server.content[:-4] + b"\0\0\0\1")
    with pytest.raises(WeightsError, match=r"model.safetensors: .*SHA-256"):
        start()


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["timm:test_resnet", "dsop-timm:test_resnet", "head:timm:test_resnet"]
)
def test_timm_weights_come_from_its_hub_and_then_from_its_cache(
    server, tmp_path, model
) -> None:
    torch.manual_seed(2)
    given = timm.create_model("test_resnet").state_dict()
    server.content = safetensors.torch.save(given)
    initial = start(f"model.name={model}")
    own = initial.model.state_dict()

    assert all(
        torch.equal(own[name], tensor)
        for name, tensor in given.items()
        if not name.startswith("fc")
    )
    assert initial.start is not None

    new = {"dsop-timm": ("branches", "fc"), "head": ("pooled_head", "pooled_head.fc")}
    assert initial.start.new == new.get(model.partition(":")[0], ("fc",))

    rules = timm.get_pretrained_cfg("test_resnet")
    found = initial.recipe.preprocess
    assert (found.crop, found.mean, found.interpolation) == (
        160,
        rules.mean,
        rules.interpolation,
    )

    server.fault = "not found"
    assert start(f"model.name={model}").start == initial.start

    blob = next((tmp_path / "hub").rglob("blobs/*"))
    blob.write_bytes(server.content[:-4] + b"\0\0\0\1")
    with pytest.raises(WeightsError, match=r"model.safetensors: .*SHA-256"):
        start(f"model.name={model}")

    server.requests.clear()
    with pytest.raises(WeightsError, match=r"test_resnet.*/model\.safetensors") as refused:
        start(f"model.name={model}")
    assert len(server.requests) == 1

    # A file that somebody copies to the place that the error names is found without a hub.
    place = re.search(rf"{tmp_path}/\S+\.safetensors", str(refused.value))
    assert place is not None

    path = Path(place[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a link to the removed blob
    path.write_bytes(server.content)
    shutil.rmtree(path.parents[2] / "refs", ignore_errors=True)  # of the earlier download

    assert start(f"model.name={model}").start == initial.start
    assert len(server.requests) == 1


def test_a_file_of_another_network_is_refused_with_its_name(tmp_path) -> None:
    with torch.device("meta"):
        network = torchvision.models.resnet50(num_classes=2)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    # One value is stored
    zeros = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    torch.save(zeros, tmp_path / "mine.pth")
    difference = r"layer1\.0\.conv1\.weight .*\(64, 64, 1, 1\)"

    with pytest.raises(WeightsError, match=rf"mine\.pth .*{difference}"):
        start("model.name=resnet18", f"start.weights={tmp_path / 'mine.pth'}")


def test_tensors_that_do_not_fit_are_named_unless_of_a_classifier() -> None:
    model = create_model("resnet8", num_classes=2)
    tensors = {f"layer9.{letter}": torch.zeros(1) for letter in "hgfedcba"} | model.state_dict()
    weights = StartWeights(
        file="mine.pth", sha256="", network="ResNet-8", tensors=tensors, preprocess=Preprocess()
    )

    with pytest.raises(WeightsError, match=r"layer9\.a"):
        load_start_weights(weights, model, ("cat", "dog"))

    distilled = create_model("timm:deit_tiny_distilled_patch16_224", num_classes=2)
    of_others = replace(weights, tensors=distilled.state_dict(), labels=("cat", "dog"))
    assert load_start_weights(of_others, distilled, ("dog", "cat")).new == ("head", "head_dist")

    # Which is not a classifier, though it contains `fc`
    container = torch.nn.ModuleDict({"net": model})
    container.training_only, container.num_classes = (), 2
    narrow = torch.nn.ModuleDict({"net": create_model("resnet8", num_classes=2, base_width=4)})

    with pytest.raises(WeightsError, match=r"net\.conv1\.weight .*\(4, 3, 3, 3\)"):
        load_start_weights(
            replace(weights, tensors=narrow.state_dict()), container, ("cat", "dog")
        )


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("name", ["timm:test_vit", "head:timm:test_vit"])
def test_weights_that_are_published_without_a_classifier_start_a_run(
    tmp_path, name: str
) -> None:
    torch.manual_seed(1)
    given = timm.create_model("test_vit", num_classes=0).state_dict()  # as DINOv2 and SigLIP
    torch.save(given, tmp_path / "vit.pth")
    initial = start(
        f"model.name={name}", "model.config={}", f"start.weights={tmp_path / 'vit.pth'}"
    )
    own = initial.model.state_dict()

    assert all(torch.equal(own[tensor], value) for tensor, value in given.items())
    assert initial.start is not None
    assert initial.start.new == (
        ("head",) if name == "timm:test_vit" else ("pooled_head", "pooled_head.fc")
    )
    with pytest.raises(WeightsError, match="no classifier"):
        import_weights(
            check_is_weights(tmp_path / "vit.pth"), "timm:test_vit", tmp_path / "ckpt.pt"
        )


def test_weights_of_a_network_that_classifies_by_a_convolution_start_a_run(tmp_path) -> None:
    name = "timm:resnetv2_18"
    torch.save(dict(create_model(name, num_classes=2).state_dict()), tmp_path / "w.pth")
    initial = start(
        f"model.name={name}", "model.config={}", f"start.weights={tmp_path / 'w.pth'}"
    )

    assert initial.start is not None
    assert initial.start.new == ("head.fc",)


@pytest.mark.parametrize("affine", [False, True])
def test_a_norm_behind_the_last_convolution_is_not_a_classifier(affine: bool) -> None:
    network: Any = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2, affine=affine)
    )
    network.training_only = ()

    assert classifier_name(network) == "1"


def test_a_classifier_is_loaded_only_for_the_same_classes(tmp_path) -> None:
    recipe = short_recipe("epochs=1")
    best = train_recipe(recipe, tmp_path / "run").best
    stored = read_checkpoint(best)
    again = short_recipe("epochs=1", f"start.weights={best}")
    same = create_initial_model(again, stored.labels, ONE_PROCESS)
    other = create_initial_model(
        again, tuple(f"other {label}" for label in stored.labels), ONE_PROCESS
    )

    assert same.start is not None
    assert (same.start.new, same.start.network) == ((), "dsop-resnet8")
    assert torch.equal(same.model.state_dict()["fc.weight"], stored.weights["fc.weight"])
    assert other.start is not None
    assert set(other.start.new) == {
        "fc",
        *(name for name in other.start.new if name.endswith(".fc")),
    }
    assert not torch.equal(other.model.state_dict()["fc.weight"], stored.weights["fc.weight"])
    assert torch.equal(other.model.state_dict()["conv1.weight"], stored.weights["conv1.weight"])

    plain = create_initial_model(
        short_recipe(
            "model.name=resnet8", "model.config={base_width=4}", f"start.weights={best}"
        ),
        stored.labels,
        ONE_PROCESS,
    )
    assert plain.start is not None
    assert (plain.start.new, plain.start.unused) == ((), ("branches",))


@pytest.mark.usefixtures("few_digits")
def test_a_run_records_its_start_and_resumes_without_the_file(tmp_path) -> None:
    first = train_recipe(
        short_recipe("epochs=1", "preprocess.mean=[0.1,0.2,0.3]"), tmp_path / "first"
    )
    moved = first.best.rename(tmp_path / "start.pt")
    values = short_recipe(f"start.weights={moved}", "epochs=1").model_dump(mode="json")
    del values["preprocess"]["mean"]
    recipe = LoopRecipe.model_validate(values)
    result = train_recipe(recipe, tmp_path / "run")

    assert result.start is not None
    assert result.start.file == "start.pt"

    stored = read_checkpoint(result.best)
    assert stored.preprocess.mean == (0.1, 0.2, 0.3)
    assert stored.training["start"] == result.start.model_dump(mode="json")

    moved.unlink()
    assert train_recipe(recipe, tmp_path / "run", resume=True).start == result.start


PRECEDENCE = [
    ("", (232, 200), (0.5, 0.5, 0.5)),
    ("crop = 100", (116, 100), (0.5, 0.5, 0.5)),
    ("mean = [0.0, 0.0, 0.0]", (232, 200), (0.0, 0.0, 0.0)),
]


@pytest.mark.parametrize(
    ("table", "sides", "mean"), PRECEDENCE, ids=[table for table, *_ in PRECEDENCE]
)
def test_values_of_the_recipe_win_over_those_of_the_weights(
    tmp_path, table, sides, mean
) -> None:
    base = Preprocess(resize=232, crop=200, mean=(0.5, 0.5, 0.5))
    settings = [f"preprocess.{line.replace(' ', '')}" for line in table.splitlines()]
    completed = complete_preprocess(read_recipe("photos", settings), base).preprocess
    assert ((completed.resize, completed.crop), completed.mean) == (sides, mean)


def test_networks_without_published_weights_and_unsuitable_values_are_named() -> None:
    cases: list[tuple[str, type[SopdeployError], str]] = [
        (
            "model.name=dsop-resnet20",
            ConfigError,
            "no ImageNet weights are published for dsop-resnet20",
        ),
        ("start.weights=nowhere.pth", SopdeployError, "nowhere.pth: no such file"),
    ]
    for setting, kind, message in cases:
        with pytest.raises(kind, match=message):
            start(setting)


@pytest.mark.usefixtures("few_digits")
def test_a_network_with_and_without_branches_starts_with_the_same_backbone() -> None:
    branched = short_recipe()
    plain = short_recipe("model.config.aux_blocks=[0,0,0]")
    labels = open_data(plain.data).train.labels
    without, with_branches = (
        create_initial_model(recipe, labels, ONE_PROCESS).model.state_dict()
        for recipe in (plain, branched)
    )

    assert all(torch.equal(with_branches[name], tensor) for name, tensor in without.items())


@pytest.mark.usefixtures("few_digits")
def test_new_classifiers_start_at_zero_if_the_recipe_says_so(tmp_path: Path) -> None:
    weights = train_recipe(short_recipe("epochs=1"), tmp_path / "run").best
    digits, others = tuple("0123456789"), tuple("abcdefghij")
    for labels, is_new in ((digits, False), (others, True)):
        recipe = short_recipe(f"start.weights={weights}", "start.new_classifier=zero")
        network = create_initial_model(recipe, labels, ONE_PROCESS).model
        classifiers = {
            name: bool(layer.weight.any())
            for name, layer in network.named_modules()
            if isinstance(layer, nn.Linear) and layer.out_features == 10
        }
        assert len(classifiers) == 4  # of the network and of three branches
        assert set(classifiers.values()) == {not is_new}


@pytest.mark.parametrize("family", ["dsop", "gsop", "isqrt", "gmsop"])
def test_a_recipe_to_fine_tune_begins_with_the_features_that_were_loaded(
    family: str,
) -> None:
    recipe = read_recipe(f"fine-tune-{family}", ["data.path=."])
    network = create_initial_model(recipe, ("one", "other"), ONE_PROCESS).model.eval()
    plain = create_initial_model(
        read_recipe("photos", ["data.path=."]), ("one", "other"), ONE_PROCESS
    ).model.eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        maps, _ = network.feature_maps(images)
        expected, _ = plain.feature_maps(images)
        logits = network(images)

    if recipe.procedure.kind == "loop":  # the others begin with the closed form of their heads
        assert not logits.any()
    # The blocks of GSoP begin open, because closed ones do not learn.
    limit = {"gsop": 1.0}.get(family, 0.2)
    assert (maps - expected).norm() < limit * expected.norm()
