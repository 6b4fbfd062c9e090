"""Networks outside of the catalog are exported with a proof, or rejected with one line on the cause."""

import io
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torchvision import models
from torchvision.ops import roi_align

import sopdeploy
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.probes import read_probes
from sopdeploy.errors import LoweringError, SopdeployError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy_commands.verify import verify
from sopdeploy_export.admit.network import check_tensor
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.user_network.admission import unused_modules
from sopdeploy_service.app import create_app
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings
from tests.export.once import proving_once
from tests.export.user_network import networks as n
from tests.export.user_network.networks import CLASSES
from tests.support.slow import mostly_slow

LABELS = tuple("abcd")
Build = Callable[[], nn.Module]


def classify_over_http(bundle: Path) -> None:
    """Send one probe image to a server of *bundle* in this process and compare the answer."""
    probes, settings, body = read_probes(open_bundle(bundle)), Settings(), io.BytesIO()
    Image.fromarray(probes.images[-1]).save(body, "PNG")
    logits = probes.expected["logits"][-1].astype(np.float64)
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    with TestClient(
        create_app({"small": load_model(bundle, settings)}, settings), "http://localhost"
    ) as client:
        response = client.post("/v1/classify", content=body.getvalue())
    assert response.status_code == 200, response.text
    found = {row["label"]: row["probability"] for row in response.json()["classes"]}
    assert found == pytest.approx(dict(zip(LABELS, expected, strict=True)), abs=1e-4)


def plain() -> nn.Module:
    return n.Small(aux=False)


AUX = {"plain": plain, "training_only": ["aux*"]}

ACCEPTED: dict[str, tuple[Build, dict[str, Any], str]] = {
    "an auxiliary head": (n.Small, AUX, "three-way"),
    "without a plain network": (
        n.Small,
        {"training_only": ["aux.*", "aux"]},
        "trained-detached",
    ),
    "nothing to detach": (plain, {"plain": plain}, "trained-plain"),
    "a list of exits": (
        lambda: n.variant(n.exits, aux=False),
        {"plain": lambda: n.variant(n.exits, aux=False), "logits_key": -1},
        "trained-plain",
    ),
    "a dict": (lambda: n.variant(n.as_dict, aux=False), {"logits_key": "out"}, "trained-only"),
    "logits in float64": (
        lambda: n.variant(lambda net, x: net.fc(net.features(x)).double(), aux=False),
        {},
        "trained-only",
    ),
    "a product of matrices in float64": (
        lambda: n.variant(n.in_float64, aux=False),
        {},
        "trained-only",
    ),
    "one tensor, not its attribute T": (plain, {"logits_key": "T"}, "trained-only"),
    "data parallel and compiled": (
        lambda: nn.DataParallel(torch.compile(n.Small())),
        AUX,
        "three-way",
    ),
    "branches of DSoP": (
        lambda: sopdeploy.dsop(
            plain(), ["stem"], image_size=n.SIDE, aux_blocks=(1,), aux_widths=(3,)
        ),
        {
            "plain": plain,
            "training_only": ["branches"],
            "rename": lambda name: name.removeprefix("network."),
        },
        "three-way",
    ),
    "a cache, a written input and a custom function": (
        lambda: n.variant(n.is_unusual),
        {"training_only": ["aux"]},
        "trained-detached",
    ),
    "second-order pooling": (n.SecondOrder, {"plain": n.SecondOrder}, "trained-plain"),
}

# Captured for one batch size, in a third of the time; other cases, and full sizes, use the
# whole range.
QUICK, RANGE = ExportOptions(max_batch=1), ExportOptions()


@pytest.mark.parametrize(
    "case", mostly_slow(ACCEPTED, "an auxiliary head", "without a plain network")
)
def test_it_is_exported_verified_and_served_with_the_strength_of_its_proof(
    case: str, tmp_path: Path
) -> None:
    build, options, proof = ACCEPTED[case]
    if case != "an auxiliary head":
        options = {"options": QUICK, **options}
    network = n.trained(build()).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    attributes = set(vars(network))
    with proving_once(alone=True) if "options" in options else nullcontext():
        exported = n.export_small(network, tmp_path, **options)

    assert exported.certificate.proof == exported.summary()["proof"] == proof
    # This one shifts its input itself, of which the export warns.
    assert len(exported.warnings) == (case == "a cache, a written input and a custom function")

    verify(exported.path)
    classify_over_http(exported.path)
    assert network.training, "the user's network is not changed"
    assert set(vars(network)) == attributes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_operator_that_only_a_later_opset_has_is_written_with_it(
    precision: str, has_mask: bool, tmp_path: Path
) -> None:
    network = n.trained(n.DeformableConvolution(has_mask=has_mask))
    options = ExportOptions(max_batch=2, precision=precision)
    exported = n.export_small(network, tmp_path, options=options)

    model = onnx.load(exported.path / "model.onnx")
    opsets = [(opset.domain, opset.version) for opset in model.opset_import]
    assert opsets == [("", 20)]
    assert exported.manifest.opset == 20
    assert model.ir_version == 9
    assert any("opset 20" in text and "DeformConv" in text for text in exported.warnings)
    verify(exported.path)


# The builder, the parts that only training uses
FULL: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "GoogLeNet": (partial(models.GoogLeNet, init_weights=False), "aux*"),
    "vit_b_32": (partial(models.get_model, "vit_b_32", weights=None), ""),
    "swin_t": (partial(models.get_model, "swin_t", weights=None), ""),
    "levit_128s": (partial(timm.create_model, "levit_128s"), ""),
}


@pytest.mark.nightly
@pytest.mark.timeout(1800)  # minutes on a machine with other work
@pytest.mark.parametrize("architecture", FULL)
def test_the_full_size_is_exported_verified_and_served(
    architecture: str, tmp_path: Path
) -> None:
    build, auxiliary = FULL[architecture]
    torch.manual_seed(0)
    network = build(num_classes=CLASSES)
    for part in network.modules():
        if (
            isinstance(part, nn.Linear) and not part.weight.any()
        ):  # torchvision's ViT starts with zeros
            nn.init.normal_(part.weight, std=0.02)
    options = {"aux_logits": False} if auxiliary else {}
    exported = n.export_small(
        network,
        tmp_path,
        plain=partial(build, num_classes=CLASSES, **options),
        training_only=[auxiliary] if auxiliary else [],
        preprocess=Preprocess(resize=224, crop=224),
        options=ExportOptions(),
    )

    assert exported.certificate.proof == ("three-way" if auxiliary else "trained-plain")
    assert bool(exported.certificate.removed) == bool(auxiliary)
    assert exported.warnings == ()

    verify(exported.path)
    classify_over_http(exported.path)


def both(network: Any, images: Tensor) -> Tensor:
    """Compute the features (2 B, 8) of the images, then of the mirrored images."""
    return network.features(torch.cat([images, images.flip(3)]))


def by_number(network: Any, images: Tensor) -> Tensor:
    tokens = network.stem(images).flatten(2).transpose(1, 2)
    largest = tokens.sum(2).sort(dim=1, descending=True, stable=True).indices[:, :5]
    return tokens[torch.arange(images.shape[0])[:, None], largest].mean(1)


def by_type(network: Any, images: Tensor) -> Tensor:
    if images.dtype != torch.float32:
        raise TypeError("float32 expected")
    return network.features(images) + torch.finfo(images.dtype).eps


FEATURES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a mean of views": lambda net, x: both(net, x).view(2, -1, 8).mean(0),
    "slices of the size of the batch": lambda net, x: (
        (f := both(net, x))[: x.shape[0]] + f[x.shape[0] :] + f[-x.shape[0] :]
    ),
    "positions by the number of the image": by_number,
    "einsum of matrices": lambda net, x: torch.einsum(
        "...im,...jm->...ij", *[net.stem(x).flatten(2)] * 2
    ).mean(2),
    "code that reads the type": by_type,
}


@pytest.mark.parametrize("case", mostly_slow(FEATURES, "a mean of views"))
def test_a_network_that_keeps_images_apart_is_exported(case: str, tmp_path: Path) -> None:
    network = n.variant(lambda net, images: net.fc(FEATURES[case](net, images)), aux=False)
    exported = n.export_small(n.trained(network), tmp_path)
    assert exported.certificate.mixes_images == ()


def regions(network: Any, images: Tensor) -> Tensor:
    corners = torch.tensor([[0.0, 0, 0, 6, 6], [0.0, 6, 6, 9, 9]])
    pooled = roi_align(network.stem(images), corners, 2).mean((0, 2, 3))
    return network.fc(pooled[None] + network.features(images))


def hooked_of_catalog() -> nn.Module:
    network = create_model("resnet8", num_classes=n.CLASSES)
    network.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return network


def with_shared_classifier() -> nn.Module:
    network = n.variant(lambda self, x: (self.fc(f := self.features(x)), self.aux(f))[0])
    network.aux = nn.Sequential(nn.Linear(8, 8), network.fc)
    return network


def with_scripted_branch() -> nn.Module:
    network = n.variant(lambda self, x: (self.fc(f := self.features(x)), self.aux(f))[0])
    network.aux = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    return network


def with_fake_quantization() -> nn.Module:
    network = plain()
    quantization = FakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    quantization(torch.linspace(-1, 1, 8))
    quantization.disable_observer()
    network.stem[1] = quantization
    return network


def asserts(network: Any, images: Tensor) -> Tensor:
    assert images.shape[-1] % 5 == 0
    raise NotImplementedError


# The file, the line below its `def`, and the code.
ASSERTED = rf"test_export_network\.py:{asserts.__code__.co_firstlineno + 1} \(assert "

REJECTED: dict[str, tuple[Build, dict[str, Any], str]] = {
    "NumPy": (lambda: n.variant(n.uses_numpy), {}, r"numpy|captured"),
    "NaN": (lambda: n.with_nan(n.Small()), {}, r"^stem\.0\.weight holds NaN"),
    "half precision": (
        lambda: n.Small().half(),
        {},
        r"^stem\.0\.weight .*torch\.float16.*\.float\(\)",
    ),
    "a ScriptModule": (lambda: torch.jit.script(plain()), {}, r"is a ScriptModule"),
    "ScriptModule": (
        with_scripted_branch,
        {"training_only": ["aux"]},
        r"aux .*ScriptModule",
    ),
    "quantization": (
        with_fake_quantization,
        {},
        r"stem\.1 .*FakeQuantize",
    ),
    "lazy modules": (n.lazy, {}, r"^fc .*not initialized"),
    "too few labels": (
        plain,
        {"labels": ("a", "b")},
        r"2 names",
    ),
    "a dict without a name": (
        lambda: n.variant(n.as_dict),
        {},
        r"out \(1, 4\), features \(1, 8\)",
    ),
    "a part that does not exist": (
        n.Small,
        {"training_only": ["head*"]},
        r"no such part",
    ),
    "a hook on a network of the catalog": (
        hooked_of_catalog,
        {},
        r"hook",
    ),
    "a part that also holds the classifier": (
        with_shared_classifier,
        {"training_only": ["aux"]},
        r"^aux\.1\.weight .*fc\.weight.*training_only='aux\.0'",
    ),
    "nothing to detach, although asked for": (
        plain,
        {"options": ExportOptions(detach=True, max_batch=1)},
        r"^detach: ",
    ),
    "too few labels for an embedding": (
        lambda: n.variant(lambda self, x: torch.nn.functional.normalize(self.features(x))),
        {},
        r"4 names for 8 outputs .*embedding",
    ),
    "an exit for a single image": (
        lambda: n.variant(
            lambda self, x: self.fc(
                self.features(x) * (2 if self.features(x).amax(1) > 1 else 1)
            )
        ),
        {},
        r"torch\.where",
    ),
    "images of another size than its linear layer takes": (
        lambda: n.variant(lambda self, x: self.fc(self.stem(x).flatten(1))),
        {},
        r"12 x 12",
    ),
    "statistics of a batch, of which one image has none": (
        lambda: n.variant(
            lambda self, x: torch.nn.functional.batch_norm(
                self.fc(self.features(x)), None, None, training=True
            )
        ),
        {},
        r"value per channel",
    ),
    "an assertion of its own": (lambda: n.variant(asserts), {}, ASSERTED),
    "a plain network with the removed part": (
        n.Small,
        {"plain": n.Small, "training_only": ["aux"]},
        r"^plain: .* aux\b",
    ),
    "a plain network with another part": (
        plain,
        {"plain": n.Small},
        r"needs aux\.bias",
    ),
    "a plain network without a part that is not removed": (
        n.Small,
        {"plain": plain},
        r"still has aux\.bias.*training_only='aux'$",
    ),
    "inference mode": (
        n.in_inference_mode,
        {},
        r"^stem\.0\.weight .*torch\.inference_mode",
    ),
    "a division by zero": (
        lambda: n.variant(n.divides_by_zero),
        {},
        r"NaN or infinite",
    ),
    "regions of the first image": (
        lambda: n.variant(regions, aux=False),
        {"options": RANGE},
        r"allow_batch_dependence",
    ),
    "a size of the batch": (
        lambda: n.variant(
            lambda net, x: net.fc(net.features(x)) * (1 if x.shape[0] < 9 else 2), aux=False
        ),
        {"options": RANGE},
        r"batch sizes .*test_export_network\.py:\d+ \(",
    ),
    "a name with a slash": (n.Small, {"name": "a/b"}, r"name='a/b': "),
}

AS_BUILT = (
    "inference mode",
    "NaN",
    "half precision",
    "a ScriptModule",
    "ScriptModule",
    "quantization",
    "lazy modules",
)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", REJECTED)
def test_it_is_rejected_with_the_cause_and_nothing_is_written(
    case: str, tmp_path: Path
) -> None:
    build, options, message = REJECTED[case]
    network = build()
    if case not in AS_BUILT:
        n.trained(network)

    with pytest.raises(SopdeployError, match=message) as error:
        n.export_small(network, tmp_path, **{"options": QUICK} | options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::UserWarning")  # sparse tensors are a beta of torch
@pytest.mark.parametrize(
    ("tensor", "advice"),
    [
        (
            torch.ones(2, 2, dtype=torch.complex64),
            r"torch\.view_as_real",
        ),
        (torch.eye(2).to_sparse(), r"\.to_dense\(\)$"),
        (torch.ones(2, device="meta"), "values$"),
        (torch.ones(2, dtype=torch.bfloat16), r"\.float\(\)"),
    ],
)
def test_a_tensor_that_is_not_accepted_is_refused_with_advice(
    tensor: Tensor, advice: str
) -> None:
    with pytest.raises(LoweringError, match=rf"^fc\.weight .*{advice}"):
        check_tensor("fc.weight", tensor)


def test_nan_in_an_unneeded_part_is_not_a_reason_to_refuse(tmp_path: Path) -> None:
    network = n.trained(n.Small())
    network.get_parameter("aux.weight").data[0] = float("nan")
    with proving_once(alone=True):
        exported = n.export_small(network, tmp_path, options=QUICK, rebuild=n.Small)

    assert exported.certificate.proof == "trained-rebuilt"
    assert "aux.weight" in {entry.name for entry in exported.certificate.unreached}


def test_a_network_is_not_an_unused_part_of_itself() -> None:
    network = n.variant(lambda _, images: images.mean((2, 3))).eval()
    assert unused_modules(network, n.PREPROCESS) == ("stem", "aux", "fc")


ENDS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "softmax": (lambda x: x.softmax(1), "returns probabilities"),
    "a mean of two": (
        lambda x: (x.softmax(1) + (2 * x).softmax(1)) / 2,
        "returns probabilities",
    ),
    "softmax by hand": (
        lambda x: x.exp() / x.exp().sum(1, keepdim=True),
        "returns probabilities",
    ),
    "sigmoid": (lambda x: x.sigmoid(), r"a sigmoid.*several.classes"),
    "sigmoid and a view": (
        lambda x: torch.special.expit(x)[:, :, None].flatten(1),
        "a sigmoid",
    ),
    "hard sigmoid": (torch.nn.functional.hardsigmoid, "a sigmoid"),
}


@pytest.mark.parametrize("end", ENDS)
def test_probabilities_are_refused_with_the_advice_to_return_logits(
    end: str, tmp_path: Path
) -> None:
    change, message = ENDS[end]
    network = n.trained(n.variant(lambda self, images: change(self.fc(self.features(images)))))
    with pytest.raises(LoweringError, match=message):
        n.export_small(network, tmp_path, options=QUICK)


def test_logits_of_several_classes_get_a_sigmoid_in_the_service(tmp_path: Path) -> None:
    exported = n.export_small(
        n.trained(n.Small(aux=False)), tmp_path, options=QUICK, several_classes=True
    )
    decision = exported.manifest.decision

    assert decision is not None
    assert (decision.activation, decision.thresholds) == ("sigmoid", (0.5,) * n.CLASSES)


READS: dict[str, Callable[[nn.Module], object]] = {
    "a slice that it calls": lambda aux: aux[:-1](torch.ones(1, 8)),
    "the type of its weights": lambda aux: next(aux.parameters()).dtype,
    "the length of a part of it": lambda aux: len(aux[0]),
}


@pytest.mark.parametrize("read", mostly_slow(READS, "the type of its weights"))
def test_a_part_is_unused_although_code_reads_its_shape(read: str) -> None:
    network = n.variant(
        lambda self, images: (READS[read](self.aux), self.fc(self.features(images)))[1]
    )
    first = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    network.aux = nn.Sequential(first, nn.ReLU(), nn.Linear(8, n.CLASSES))

    assert unused_modules(network.eval(), n.PREPROCESS) == ("aux",)


def test_folders_of_photos_are_checked_before_the_network_runs(tmp_path: Path) -> None:
    (tmp_path / "photos" / "no class").mkdir(parents=True)
    options = QUICK.model_copy(update={"precision": "fp16", "evaluate": tmp_path / "photos"})
    steps: list[str] = []

    with pytest.raises(SopdeployError, match="photos"):
        n.export_small(
            n.trained(n.Small()), tmp_path / "out", options=options, on_step=steps.append
        )
    assert steps == []


def test_an_unused_part_is_a_warning(tmp_path: Path) -> None:
    network = n.trained(n.Small())
    assert unused_modules(network, n.PREPROCESS) == ("aux",)

    exported = n.export_small(network, tmp_path, options=QUICK)
    [warning] = exported.warnings
    assert " aux;" in warning


def test_a_tensor_that_code_reads_as_a_number_is_kept(
    tmp_path: Path,
) -> None:
    network = n.variant(
        lambda self, images: self.fc(self.features(images)) / float(self.scale), aux=False
    )
    network.register_buffer("scale", torch.tensor(2.0))
    exported = n.export_small(n.trained(network), tmp_path, options=QUICK)

    assert exported.warnings == ()
    assert "scale" in [entry.name for entry in exported.certificate.kept]


class ReadsItsFlag(nn.Linear):
    """A branch that reads a number of its own, as layers do that initialize themselves in training."""

    def __init__(self) -> None:
        super().__init__(8, n.CLASSES)
        self.register_buffer("ready", torch.tensor(1))
        self.state = nn.Module()
        self.state.register_buffer("steps", torch.tensor(3))

    def forward(self, features: Tensor) -> Tensor:
        if self.ready.item() == 0 or int(self.state.steps) == 0:
            return features
        return super().forward(features)


class HoldsNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))


@pytest.mark.slow
def test_a_branch_is_unused_although_it_reads_a_number_of_its_own() -> None:
    network = n.variant(
        lambda self, images: (self.aux(self.features(images)), self.fc(self.features(images)))[
            1
        ]
    )
    network.aux = ReadsItsFlag()

    assert unused_modules(network.eval(), n.PREPROCESS) == ("aux",)


@pytest.mark.slow
def test_a_part_whose_number_is_read_outside_of_it_is_used() -> None:
    network = n.variant(
        lambda self, images: self.fc(self.features(images)) / float(self.aux.scale)
    )
    network.aux = HoldsNumber()

    assert unused_modules(network.eval(), n.PREPROCESS) == ()
