"""What a network may return as its logits: one of them, none that depend on the image, or something else."""

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from sopdeploy.base.files import GRAPH
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.errors import CertificateError, LoweringError, SopdeployError
from sopdeploy_commands.app import app
from sopdeploy_commands.predict import predict
from sopdeploy_commands.verify import verify
from sopdeploy_export.admit.outputs import check_logits
from sopdeploy_export.capture.deployed import generated_images
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.user_network.admission import unused_modules
from tests.export.user_network.networks import PREPROCESS, SIDE, Small, export_small, trained
from tests.support.slow import mostly_slow

MODULE = "tests.export.user_network.test_logits"
QUICK = ExportOptions(max_batch=4)


class Binary(Small):
    """A binary classifier with one logit, as binary cross-entropy trains it."""

    def __init__(self, end: Callable[[Tensor], Tensor] = torch.Tensor.clone) -> None:
        super().__init__(aux=False)
        self.fc = nn.Linear(8, 1)
        self.end = end

    def forward(self, images: Tensor) -> Tensor:
        return self.end(self.fc(self.features(images)))


class Returns(Small):
    """Returns what *end* makes of its logits."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__(aux=False)
        self.end = end

    def forward(self, images: Tensor) -> Tensor:
        return self.end(self.fc(self.features(images)))


NAMES_OF_ONE_LOGIT: dict[str, tuple[nn.Module, dict[str, Any], str]] = {
    "one name": (
        Binary(),
        {"labels": ["fake"]},
        "several_c",
    ),
    "three names": (Binary(), {"labels": ["a", "b", "c"]}, r"3 names"),
    "two names with sigmoids": (
        Binary(),
        {"labels": ["real", "fake"], "several_classes": True},
        r"2 names",
    ),
    "a row of numbers": (
        Binary(lambda x: x.flatten()),
        {"labels": ["real", "fake"]},
        r"returns \(2,\).*squeeze",
    ),
    "a sigmoid": (Binary(torch.sigmoid), {"labels": ["real", "fake"]}, r"a sigmoid"),
    "a sigmoid and its rest": (
        Returns(lambda x: torch.cat([1 - x[:, :1].sigmoid(), x[:, :1].sigmoid()], 1)),
        {"labels": ["real", "fake"]},
        r"returns probabilities",
    ),
}


@pytest.mark.parametrize("case", NAMES_OF_ONE_LOGIT)
def test_a_network_with_one_logit_is_refused_with_the_names_that_fit(
    case: str, tmp_path: Path
) -> None:
    network, arguments, message = NAMES_OF_ONE_LOGIT[case]

    with pytest.raises(SopdeployError, match=message):
        export_small(trained(network), tmp_path, options=QUICK, **arguments)
    assert not list(tmp_path.iterdir())


def test_two_names_of_one_logit_have_its_sigmoid_and_the_rest(tmp_path: Path) -> None:
    network = trained(Binary())
    exported = export_small(network, tmp_path, options=QUICK, labels=["real", "fake"])

    images = generated_images(SIDE)
    session = onnxruntime.InferenceSession(
        exported.path / GRAPH, providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(["logits"], {session.get_inputs()[0].name: images})
    assert not logits[:, 0].any()
    assert np.ptp(logits[:, 1]) > 0

    decision = open_bundle(exported.path).manifest.decision
    assert decision is None or decision.activation == "softmax"
    assert "probability of fake" in exported.warnings[0]


@pytest.mark.slow
def test_one_name_of_one_logit_has_its_sigmoid(tmp_path: Path) -> None:
    exported = export_small(
        trained(Binary()), tmp_path, options=QUICK, labels=["fake"], several_classes=True
    )

    decision = exported.manifest.decision
    assert decision is not None
    assert decision.activation == "sigmoid"


def one_logit() -> nn.Module:
    return Binary()


@pytest.mark.slow
@pytest.mark.parametrize("names", [["fake"], ["real", "fake"]])
def test_what_inspect_prints_of_one_logit_exports_it(names: list[str], tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    torch.save(trained(Binary()).state_dict(), weights)
    arguments = ["--network", f"{MODULE}:one_logit", "--preprocess", f"imagenet:{SIDE}"]

    inspected = CliRunner().invoke(app, ["inspect", str(weights), *arguments])
    assert inspected.exit_code == 0, inspected.output

    # The command as printed for a single name, without its last option for two.
    line = next(line for line in inspected.output.splitlines() if "sopdeploy export" in line)
    words = line.split()[2:]
    if len(names) == 2:
        words.remove("--several-classes")
    file = tmp_path / "labels.txt"
    file.write_text("\n".join(names), encoding="utf-8")
    words[words.index("labels.txt")] = str(file)
    exported = CliRunner().invoke(
        app, ["export", *words, "--out", str(tmp_path / "out"), "--max-batch", "4"]
    )
    assert exported.exit_code == 0, exported.output


EQUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: 0 * x,
    "a bias alone": lambda x: 0 * x + torch.arange(4.0),
    "rounding alone": lambda x: 1e-9 * x + 1,
}


@pytest.mark.parametrize("case", EQUAL)
def test_logits_that_no_image_changes_are_refused_after_the_first_run(
    case: str, tmp_path: Path
) -> None:
    steps: list[str] = []

    with pytest.raises(LoweringError, match=r"allow_numerical_error=True$"):
        export_small(
            trained(Returns(EQUAL[case])), tmp_path, options=QUICK, on_step=steps.append
        )
    assert steps == ["running the network"]


def of_first_class(x: Tensor) -> Tensor:
    """Return the first of the logits *x* (B, C) for all classes, so that their softmax is always the same."""
    return x[:, :1].expand(-1, x.shape[1])


def test_probabilities_that_no_image_changes_are_refused_after_the_first_run(
    tmp_path: Path,
) -> None:
    steps: list[str] = []

    with pytest.raises(LoweringError, match=r"same probabilities"):
        export_small(
            trained(Returns(of_first_class)), tmp_path, options=QUICK, on_step=steps.append
        )
    assert steps == ["running the network"]


@pytest.mark.slow
def test_equal_logits_of_several_classes_are_exported(tmp_path: Path) -> None:
    network = trained(Returns(of_first_class))
    exported = export_small(network, tmp_path, options=QUICK, several_classes=True)
    assert exported.manifest.decision is not None


def test_equal_logits_are_exported_with_a_warning_on_demand(
    tmp_path: Path,
) -> None:
    options = QUICK.model_copy(update={"allow_numerical_error": True})
    network = trained(Returns(EQUAL["a bias alone"]))
    exported = export_small(network, tmp_path, options=options)
    assert any("same logits" in warning for warning in exported.warnings)


def test_no_option_is_named_where_nothing_is_exported() -> None:
    network = trained(Returns(EQUAL["a bias alone"]))
    with pytest.raises(LoweringError, match=r"reaches them$"):
        unused_modules(network, PREPROCESS)


def masked(value: float) -> Callable[[Tensor], Tensor]:
    """Return a function that masks the last class by *value*."""
    return lambda x: torch.cat([x[:, :3], torch.full_like(x[:, 3:], value)], 1)


def added(value: float) -> Callable[[Tensor], Tensor]:
    """Return a function that adds *value* to the logit of the last class."""
    return lambda x: x + torch.tensor([0.0, 0.0, 0.0, value])


# How the last class is masked, and whether its logit is the same for all images.
MASKS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "-1e3": (masked(-1e3), True),
    "-1e9": (masked(-1e9), True),
    "the smallest number": (masked(torch.finfo(torch.float32).min), True),
    "minus infinity": (masked(-torch.inf), True),
    "-1e3 is added": (added(-1e3), False),
    "-1e12 is added": (added(-1e12), True),
    "a large number that varies": (
        lambda x: torch.cat([x[:, :3], -1e6 * (1 + 0.1 * x[:, 3:].sigmoid())], 1),
        False,
    ),
    "all logits are large": (lambda x: x + 1000, False),
}


@pytest.mark.parametrize(
    "case", mostly_slow(MASKS, "-1e9", "minus infinity", "a large number that varies")
)
def test_a_class_that_is_masked_is_exported_and_named_if_it_never_changes(
    case: str, tmp_path: Path
) -> None:
    end, never_changes = MASKS[case]
    exported = export_small(trained(Returns(end)), tmp_path, options=QUICK)

    assert exported.parity.passed
    assert exported.parity.logits.tolerance < 0.01 * exported.parity.spread
    named = [warning for warning in exported.warnings if "the logit of d" in warning]
    assert bool(named) is never_changes
    assert verify(exported.path).golden
    (prediction,) = predict(exported.path, np.zeros((SIDE, SIDE, 3), np.uint8))
    probabilities = {each.label: each.probability for each in prediction.classes}
    assert (probabilities["d"] == 0) is (case != "all logits are large")


class DiffersRarely(Returns):
    """Adds 0.4 to the logit of the first class for images of single pixels, which no graph shows."""

    def forward(self, images: Tensor) -> Tensor:
        logits = self.fc(self.features(images))
        with suppress(Exception):  # in the capture, which has no values
            contrast = (images - F.avg_pool2d(images, 3, 1, 1)).abs().mean((1, 2, 3))
            if contrast.max().item() > 1.2:
                logits = logits + torch.tensor([0.4, 0.0, 0.0, 0.0])
        return self.end(logits)


@pytest.mark.parametrize(
    "case", mostly_slow(MASKS, "-1e3", "-1e9", "minus infinity", "all logits are large")
)
def test_a_mask_hides_no_difference_of_the_other_classes(case: str, tmp_path: Path) -> None:
    end, _ = MASKS[case]
    with pytest.raises(CertificateError, match="gives other outputs than its graph"):
        export_small(trained(DiffersRarely(end)), tmp_path, options=QUICK)


BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "infinity for a class": masked(torch.inf),
    "NaN for a class": masked(torch.nan),
    "minus infinity for all classes": lambda x: x - torch.inf,
    "minus infinity for some images": lambda x: x.where(x < x.mean(), -torch.inf),
}


@pytest.mark.parametrize("case", BROKEN)
def test_other_logits_that_are_not_finite_are_refused(case: str, tmp_path: Path) -> None:
    with pytest.raises(SopdeployError):
        export_small(trained(Returns(BROKEN[case])), tmp_path, options=QUICK)
    assert not list(tmp_path.iterdir())


LOGITS = torch.tensor([[3.0, -1.0, 0.5], [-2.0, 0.25, 5.0], [1.0, 7.0, -6.0]])

OTHER_VALUES: dict[str, tuple[Tensor, bool, str]] = {
    "logits": (LOGITS, False, ""),
    "logits of sigmoids": (LOGITS, True, ""),
    "negative logits": (LOGITS - 8, False, ""),
    "log probabilities": (
        LOGITS.log_softmax(1),
        False,
        "logarithm",
    ),
    "log probabilities with sigmoids": (
        LOGITS.log_softmax(1),
        True,
        r"log probabilities .*sigmoid",
    ),
    "percentages": (100 * LOGITS.softmax(1), False, r"percentages .*softmax"),
    "probabilities that sum to nothing": (
        LOGITS.sigmoid().clamp(0.1, 0.8),
        False,
        r"probabilities .*softmax",
    ),
    "probabilities of several classes": (
        LOGITS.sigmoid().clamp(0.1, 0.8),
        True,
        r"probabilities .*sigmoid",
    ),
    "probabilities that vary little": (
        (LOGITS / 8).sigmoid(),
        False,
        r"probabilities .*softmax",
    ),
    "small logits": (0.9 * F.normalize(LOGITS), False, ""),
    "embeddings": (F.normalize(LOGITS), False, "embeddings"),
    "embeddings of several classes": (F.normalize(LOGITS), True, "embeddings"),
    "embeddings but for one image": (torch.cat([F.normalize(LOGITS), LOGITS[:1]]), False, ""),
    "nearly equal logits within 0 and 1": (0.5 + 0.02 * LOGITS, False, ""),
    "different biases within 0 and 1": (
        torch.tensor([0.1, 0.5, 0.9]) + 0.01 * LOGITS,
        False,
        "",
    ),
    "one probability": (
        LOGITS[:, :1].sigmoid(),
        False,
        r"probabilities .*sigmoid",
    ),
    "one small logit": (0.1 * LOGITS[:, :1], False, ""),
    "one logit within 0 and 1": (0.5 + 0.05 * LOGITS[:, :1], False, ""),
}


@pytest.mark.parametrize("case", OTHER_VALUES)
def test_values_that_are_hardly_logits_are_named_with_the_activation_that_follows(
    case: str,
) -> None:
    values, several_classes, expected = OTHER_VALUES[case]

    warnings = check_logits(values, several_classes=several_classes)
    assert bool(warnings) is bool(expected)
    assert re.search(expected, "".join(warnings))


def test_an_export_prints_the_warning_of_its_values(tmp_path: Path) -> None:
    network = trained(Returns(lambda x: 100 * x.softmax(1)))
    exported = export_small(network, tmp_path, options=QUICK)
    assert any("percentages" in warning for warning in exported.warnings)
