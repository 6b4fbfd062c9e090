"""The poolings of `plugins/papers` are found, train, export with proof and are served."""

import math
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

import sopdeploy
from sopdeploy import describe
from sopdeploy.base import plugins
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.errors import ConfigError
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize, images_format
from sopdeploy.layers.pooling.base import GlobalPooling, unit_signed_root
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy.training.start_weights import StartWeights, load_start_weights
from sopdeploy.weights.checkpoint import Checkpoint, build_classifier, read_checkpoint
from sopdeploy.weights.published import published_network
from sopdeploy_commands.app import app
from sopdeploy_papers.poolings.dropcov import DropCov
from sopdeploy_papers.poolings.low_rank import LowRankClassifier, ReducedBilinear
from sopdeploy_papers.poolings.sketch import draw_sketch
from sopdeploy_papers.reproduction.tables import load_tables
from sopdeploy_service.app import create_app
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings
from tests.docs.reading import ROOT, blocks, command_lines
from tests.plugins.reference_runtime import ReferenceRuntime
from tests.plugins.stripes import StripesConfig
from tests.sopdeploy.layers.numerics.all_poolings import relu_features
from tests.sopdeploy.training.runs import few_digits
from tests.support import quick_torch
from tests.support.pictures import encoded

PAGE = ROOT / "docs" / "train.md"
# Small options of each pooling, by kind
SMALL: dict[str, dict[str, Any]] = {
    "cbp": {"dim": 16, "seed": 7},
    "kernel": {"dim": 16, "seed": 3},
    "netvlad": {"words": 3},
    "netfv": {"words": 3},
    "dropcov": {"width": 8},
}


def as_in_a_new_process(patch: pytest.MonkeyPatch) -> None:
    """Forget what was registered, so that a name imports the package again."""
    patch.delitem(sys.modules, "sopdeploy_papers.plugin", raising=False)
    for registry in (
        plugins.DATA_SOURCES,
        plugins.IMPORTERS,
        plugins.MODELS,
        plugins.OPTIMIZERS,
        plugins.POOLINGS,
        plugins.RUNTIMES,
        plugins.TEACHERS,
    ):
        patch.setattr(registry, "registered", {})


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with quick_torch.one_thread():
        yield


@pytest.fixture(autouse=True)
def _with_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    as_in_a_new_process(monkeypatch)


@pytest.fixture
def reference(_with_plugins: None) -> None:
    sopdeploy.register_runtime("onnx-reference", ReferenceRuntime)


def build(kind: str, channels: int, **options: Any) -> GlobalPooling:
    choice = {"kind": kind, **SMALL[kind], **options}
    return pydantic.TypeAdapter(Pooling).validate_python(choice).build(channels)


VGG = {"classifier": "linear"}
RESNET = {"conv5_stride": 1}
BACKBONE = 23_508_032  # parameters of ResNet-50 without its classifier
# network, options, length of the vector, parameters with 200 classes (DropCov: 1000)
COUNTS = [
    ("vgg16-bn", {"pooling": "cbp", **VGG}, 8192, None),
    ("vgg16-bn", {"pooling": "kernel", **VGG}, 12801, None),  # "13K"
    ("vgg16-bn", {"pooling": "netvlad", **VGG}, 32768, None),  # "32K"
    ("vgg16-bn", {"pooling": "netfv", **VGG}, 65536, None),
    (
        "resnet50",
        {"pooling": {"kind": "cbp", "dim": 14000}, **RESNET},
        14000,
        BACKBONE + 14001 * 200,
    ),
    # 78.19 % with 32.0 M parameters; 3 are those of the importance of channels
    (
        "resnet50",
        {"pooling": "dropcov", **RESNET},
        8256,
        BACKBONE + 2048 * 128 + 256 + 3 + 8257 * 1000,
    ),
]


@pytest.mark.parametrize(("name", "config", "length", "parameters"), COUNTS)
def test_vectors_and_parameters_are_those_of_the_papers(
    name: str, config: dict[str, Any], length: int, parameters: int | None
) -> None:
    counted = describe(
        name, num_classes=1000 if config["pooling"] == "dropcov" else 200, **config
    )

    assert counted.representation == length
    assert parameters in {None, counted.training.parameters}


def test_low_rank_bilinear_pooling_has_the_factors_of_each_class() -> None:
    with torch.device("meta"):
        network = sopdeploy.create_model("lrbp-vgg16", num_classes=200)
    parts: Any = network

    assert parts.pooling.out_features == 10_000

    counts = {
        name: sum(p.numel() for p in getattr(parts, name).parameters())
        for name in ("pooling", "classifier")
    }
    assert counts == {"pooling": 512 * 100, "classifier": 200 * 8 * 100 + 200}


@pytest.mark.parametrize("kind", SMALL)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    torch.manual_seed(4)
    features = relu_features(2, 4, 4).requires_grad_()
    pooling = build(kind, 4).double().eval()
    parameters = [
        p for name, p in pooling.named_parameters() if not name.startswith("importance")
    ]

    assert torch.autograd.gradcheck(
        lambda x, *_: pooling(x), (features, *parameters), fast_mode=True
    )


def test_low_rank_bilinear_pooling_starts_from_the_weights_of_vgg16() -> None:
    with torch.device("meta"):
        source = sopdeploy.create_model("vgg16-bn", num_classes=1000)
    tensors = {
        name: torch.full(tensor.shape, 0.5)
        for name, tensor in source.state_dict().items()
        if "layers" in name
    }
    tensors["classifier.6.bias"] = torch.zeros(1000)
    network = sopdeploy.create_model("lrbp-vgg16", num_classes=3, width=4)
    given = StartWeights(
        file="vgg16_bn.pth",
        sha256="",
        network="VGG-16",
        tensors=tensors,
        preprocess=Preprocess(),
    )
    report = load_start_weights(given, network, ("a", "b", "c"))

    assert report.new == ("classifier", "pooling")
    assert report.unused == ("classifier",)
    assert all(bool((value == 0.5).all()) for name, value in network.layers.named_parameters())
    assert published_network("lrbp-vgg16", network.config) == "vgg16_bn"


def test_gradients_of_low_rank_bilinear_pooling_are_those_of_finite_differences() -> None:
    torch.manual_seed(4)
    features = relu_features(2, 4, 4).requires_grad_()
    network = torch.nn.Sequential(ReducedBilinear(4, 3), LowRankClassifier(3, 2, 5)).double()

    assert torch.autograd.gradcheck(network, (features,), fast_mode=True)

    logits = network(features)
    classifier = network[1]
    vector = network[0](features)
    for k in range(5):
        plus, minus = classifier.weight[2 * k : 2 * k + 2]
        expected = vector @ (torch.outer(plus, plus) - torch.outer(minus, minus)).flatten()
        torch.testing.assert_close(logits[:, k], expected)


def tensor_sketch(x_MC: Tensor, sketches: list[Any], dim: int) -> Tensor:
    """Convolve the sketches of each position as the papers define it, and sum over positions."""
    total = torch.zeros(dim, dtype=torch.float64)
    for x in x_MC:
        spectrum = torch.ones(dim, dtype=torch.complex128)
        for elements, signs in sketches:
            sketch = torch.zeros(dim, dtype=torch.float64)
            for channel, (element, sign) in enumerate(zip(elements, signs, strict=True)):
                sketch[element] += sign * x[channel]
            spectrum = spectrum * torch.fft.fft(sketch)
        total += torch.fft.ifft(spectrum).real
    return total


@pytest.mark.parametrize(("kind", "orders"), [("cbp", (2,)), ("kernel", (2, 3, 4))])
def test_sketches_are_circular_convolutions_as_in_the_papers(
    kind: str, orders: tuple[int, ...]
) -> None:
    maps = relu_features(1, 5, 3)
    generator = random.Random(SMALL[kind]["seed"])
    x_MC = maps[0].flatten(start_dim=1).T
    parts = [torch.ones(1, dtype=torch.float64), x_MC.mean(dim=0)] if kind == "kernel" else []

    for order in orders:
        sketch = tensor_sketch(x_MC, [draw_sketch(generator, 5, 16) for _ in range(order)], 16)
        weight = 1.0 / math.sqrt(math.factorial(order)) if kind == "kernel" else 1.0
        parts.append(weight * sketch / (len(x_MC) if kind == "kernel" else 1))
    vector = torch.cat(parts)
    expected = vector.sign() * vector.abs().sqrt()
    found = build(kind, 5).double()(maps)[0].detach()
    torch.testing.assert_close(found, expected / expected.norm(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["netvlad", "netfv"])
def test_words_collect_their_residuals_and_are_assigned_by_distance_at_first(kind: str) -> None:
    torch.manual_seed(1)
    maps = torch.randn(1, 4, 2, 5, dtype=torch.float64)
    layer = build(kind, 4, alpha=0.7).double()
    x_MC = maps[0].flatten(start_dim=1).T
    centers = layer.get_parameter("centers").detach()
    shares = (-0.7 * (x_MC[:, None] - centers).square().sum(dim=2)).softmax(dim=1)
    residuals = x_MC[:, None] - centers
    halves = [
        (shares[:, :, None] * residuals**power).sum(dim=0)
        for power in ((1, 2) if kind == "netfv" else (1,))
    ]
    units = [torch.nn.functional.normalize(half, dim=1).flatten() for half in halves]
    expected = torch.cat([unit / unit.norm() for unit in units])

    torch.testing.assert_close(
        layer(maps)[0].detach(), expected / expected.norm(), rtol=1e-5, atol=1e-6
    )


def test_dropcov_drops_the_channels_of_an_image_in_training() -> None:
    torch.manual_seed(0)
    layer = build("dropcov", 6)
    maps = torch.randn(64, 6, 5, 5).relu()
    assert isinstance(layer, DropCov)
    rows, columns = torch.triu_indices(6, 6)
    expected = torch.stack([torch.cov(m.flatten(1), correction=0)[rows, columns] for m in maps])
    torch.testing.assert_close(layer.eval()(maps), expected)
    layer.train()
    layer.rate = lambda *_: torch.tensor(0.5)  # type: ignore[method-assign]
    dropped = (layer(maps) == 0).reshape(64, -1)[:, [0, 6, 11, 15, 18, 20]]  # the diagonal

    assert 0.4 < dropped.float().mean() < 0.6
    for rate in (0.0, 1.0):
        layer.rate = lambda *_, rate=rate: torch.tensor(rate)  # type: ignore[method-assign]
        found = layer(maps)
        assert bool((found == 0).all()) == (rate == 1.0)
        assert found.isfinite().all()


def test_the_rate_of_dropcov_is_that_of_the_released_code() -> None:
    layer = build("dropcov", 4)
    maps = relu_features(3, 4, 4).float()
    assert isinstance(layer, DropCov)

    weights = layer.weights(maps)
    sums = torch.stack([torch.cov(m.flatten(1), correction=0).sum(dim=1) for m in maps])
    cosine = (weights * sums).sum(dim=1) / weights.norm(dim=1) / sums.norm(dim=1)
    expected = (1 - 10 / math.log2(4) * cosine.mean()).clamp(0, 1)
    torch.testing.assert_close(layer.rate(maps, weights), expected)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.stderr
    return result


def train(out: Path, *assignments: str) -> Checkpoint:
    settings = [word for assignment in assignments for word in ("--set", assignment)]
    run("train", "--recipe", "digits-plain", *settings, "--out", out)
    return read_checkpoint(out / "best.pt")


# Changes to the recipe of the digits, by kind of pooling or name of the network
TRAINED = {
    kind: [
        "model.config.base_width=8",
        *(
            f"model.config.pooling.{key}={value}"
            for key, value in {"kind": kind, **options}.items()
        ),
    ]
    for kind, options in SMALL.items()
}
TRAINED["lrbp-vgg16"] = [
    'model={name="lrbp-vgg16"}',
    "preprocess.resize=32",
    "preprocess.crop=32",
]
# It diverges with the rate of the recipe, 0.1
TRAINED["lrbp-vgg16"].append("optimizer.lr=0.01")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if name == "dropcov" else pytest.param(name, marks=pytest.mark.nightly)
        for name in TRAINED
    ],
)
def test_each_pooling_learns_and_is_exported_with_proof_and_served(
    name: str, tmp_path: Path
) -> None:
    with few_digits(every=6):
        found = train(tmp_path / "run", "epochs=4", "batch_size=16", *TRAINED[name])
    assert found.training["metrics"]["top1"] > 0.3  # of ten digits
    if name in SMALL:
        assert found.config["pooling"].items() >= {"kind": name, **SMALL[name]}.items()

    assert "plugins" not in found.training  # it is of the same wheel
    output = run(
        "export", tmp_path / "run/best.pt", "--max-batch", 4, "--out", tmp_path / "bundles"
    ).stdout

    assert "same graph" in output
    run("verify", tmp_path / "bundles/latest")
    check_served(tmp_path / "run/best.pt", tmp_path / "bundles/latest")


def check_served(checkpoint: Path, bundle: Path) -> None:
    """Compare the answer of a server to an image with the logits of the trained network."""
    content = read_checkpoint(checkpoint)
    settings = Settings(threads=1, runtime="onnxruntime-cpu")
    side = content.preprocess.crop
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    )

    with TestClient(
        create_app({"digits": load_model(bundle, settings)}, settings), "http://localhost"
    ) as client:
        answer = client.post("/v1/classify", content=encoded(image)).json()
    pixels = torch.tensor(preprocess_image(image, content.preprocess)[None])
    network = build_classifier(content, checkpoint)
    logits_C = network(Normalize(content.preprocess, images_format(network))(pixels))[
        0
    ].detach()
    temperature = 1.0 if content.decision is None else content.decision.temperature
    expected = dict(
        zip(content.labels, (logits_C / temperature).softmax(dim=0).tolist(), strict=True)
    )
    served = {entry["label"]: entry["probability"] for entry in answer["classes"]}

    assert len(served) == min(5, len(expected))
    assert served == pytest.approx({label: expected[label] for label in served}, abs=1e-4)


def test_a_network_is_trained_on_the_images_of_a_plug_in(tmp_path: Path) -> None:
    sopdeploy.register_data_source(StripesConfig)
    found = train(tmp_path, 'data={kind="stripes", count=8}', "epochs=1", "batch_size=8")

    assert found.labels == ("horizontal", "vertical")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the recipe of the page, by the command there."""
    folder = tmp_path_factory.mktemp("example")
    recipe = folder / "dropcov.toml"
    recipe.write_text(blocks(PAGE, "toml")[0], encoding="utf-8")
    (typed,) = [words for words in command_lines(PAGE) if recipe.name in words]

    with pytest.MonkeyPatch.context() as patch:
        as_in_a_new_process(patch)
        run(
            *(recipe if word == recipe.name else word for word in typed),
            "--out",
            folder / "run",
        )

    return folder / "run/best.pt"


@pytest.mark.slow
@pytest.mark.usefixtures("reference")
def test_the_recipe_of_the_page_is_served_by_a_plug_in_runtime(
    checkpoint: Path, tmp_path: Path
) -> None:
    found = read_checkpoint(checkpoint)
    assert (found.model, found.config["pooling"]["kind"]) == ("resnet8", "dropcov")
    run("export", checkpoint, "--max-batch", 4, "--out", tmp_path)
    bundle = open_bundle(tmp_path / "latest")
    settings = Settings(runtime="onnx-reference", threads=1)
    loaded = load_model(bundle.path, settings)
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    with TestClient(create_app({"digits": loaded}, settings), "http://localhost") as client:
        answer = client.post("/v1/classify", content=encoded(Image.fromarray(image))).json()
        (served,) = client.get("/info").json()["models"]

    assert {entry["label"] for entry in answer["classes"]} <= set(found.labels)
    assert served["runtime"].split()[0] == "onnx-reference"


def test_models_lists_its_network_and_env_no_plug_in() -> None:
    lines = run("models").stdout.splitlines()

    assert lines[lines.index("Networks of other packages") + 1].startswith("psdr-resnet50 ")
    assert "papers" not in run("env").stdout


def test_help_lists_its_command_without_importing_it() -> None:
    code = "import sys; from sopdeploy_commands.app import app; app(['--help'], standalone_mode=False)"
    check = "assert not [name for name in sys.modules if 'papers' in name or name == 'torch']"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {check}"], capture_output=True, text=True, check=True
    )

    assert "reproduce" in done.stdout


class Hides(MetaPathFinder):
    """Finds no module of the package, as if it were not installed."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "sopdeploy_papers":
            raise ModuleNotFoundError(name=name)


@pytest.mark.parametrize("arguments", [["dsop-9a"], ["--help"]])
def test_without_the_package_its_command_says_what_to_install(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.startswith("sopdeploy_papers")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Hides, *sys.meta_path])
    result = CliRunner().invoke(app, ["reproduce", *arguments])

    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "./plugins/papers" in result.stderr
    assert result.stderr.endswith("[not_installed]\n")


def test_the_page_shows_the_code_of_the_example() -> None:
    code = (ROOT / "examples" / "power_mean" / "power_mean.py").read_text(encoding="utf-8")
    code = re.sub(r' *"""[^"]*"""\n\n?', "", code)
    shown = [block for block in blocks(PAGE, "text") if block.startswith("@sopdeploy")]

    assert len(shown) == 1
    assert shown[0].strip() in code


def test_the_core_does_not_name_it() -> None:
    words = re.compile(r"sopdeploy_papers|\b(?:cbp|netfv|dropcov|lrbp)\b", re.IGNORECASE)
    files = [
        path
        for room in ("sopdeploy", "export", "service", "commands")
        for path in (ROOT / room).rglob("*.py")
    ]
    named = {
        path.relative_to(ROOT).as_posix(): words.findall(path.read_text(encoding="utf-8"))
        for path in files
    }

    assert {path: found for path, found in named.items() if found} == {
        "commands/sopdeploy_commands/app.py": ["sopdeploy_papers"]  # the command `reproduce`
    }


# `missing` of a row has the reason
CITED_ONLY = {"fbn", "sort", "dropblock", "genet", "cmpe", "hihca-vgg16", "senet"}


def test_each_row_of_each_table_has_a_network_or_a_reason() -> None:
    missing = {row.id for table in load_tables().values() for row in table.rows if row.missing}
    assert missing <= CITED_ONLY
    assert [row.id for row in load_tables()["gsop-6"].rows if row.missing] == ["senet", "cmpe"]

    for table in load_tables().values():
        for row in table.rows:
            assert not (row.missing and (row.set or not row.cited)), (table.id, row.id)
            if (recipe := table.recipe_of(row)) is not None and recipe[0]:
                read_recipe(*recipe)  # a network and options that exist


# Tables share networks.
BUILT: set[str] = set()


@pytest.mark.slow
@pytest.mark.parametrize("name", load_tables())
def test_the_network_of_each_row_is_built(name: str) -> None:
    table = load_tables()[name]
    for row in table.rows:
        if (recipe := table.recipe_of(row)) is None or not recipe[0]:
            continue
        model = read_recipe(*recipe).model
        if (network := model.model_dump_json()) not in BUILT:
            with torch.device("meta"):
                sopdeploy.create_model(model.name, num_classes=10, **model.config)
            BUILT.add(network)


def test_the_signed_root_of_low_rank_bilinear_pooling_is_an_option() -> None:
    features = relu_features(2, 4, 4)
    plain = ReducedBilinear(4, 3)
    rooted = ReducedBilinear(4, 3, signed_root=True)
    rooted.load_state_dict(plain.state_dict())
    torch.testing.assert_close(
        rooted.float()(features.float()), unit_signed_root(plain(features.float()))
    )

    with pytest.raises(ConfigError, match="its own pooling"):
        sopdeploy.create_model("lrbp-vgg16", num_classes=3, pooling="isqrt")
