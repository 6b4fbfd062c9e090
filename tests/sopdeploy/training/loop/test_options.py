"""Options of a step by torch and timm: fp16, accumulation, compilation, RandAugment, erasing, mixing."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from sopdeploy.data.augment import Augmentations, AugmentedDataset, CenterCrop
from sopdeploy.data.photos.photo import ArrayImages
from sopdeploy.data.timm_augment import Mixing, RandAugment, RandomErasing, seeded
from sopdeploy.errors import ConfigError, TrainingError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.training.loop.gradient import train_step
from sopdeploy.training.loop.losses import Loss, sum_losses
from sopdeploy.training.train import train_recipe
from sopdeploy.weights.checkpoint import read_checkpoint
from tests.sopdeploy.training.runs import interrupt, one_process_run, same_run, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

PLAIN = ["model.name=resnet8", "model.config={base_width=4}", "epochs=2"]
OPTIONS = {
    "fp16": ["precision=fp16"],
    "accumulation": ["grad_accum_steps=3"],
    "RandAugment": ["rand_augment={}", "workers=1"],
    "erasing": ["random_erasing={probability=1}"],
    "mixing": ["mixing={}", "batch_size=37"],
    "all but compile": [
        "precision=fp16",
        "grad_accum_steps=2",
        "rand_augment={}",
        "random_erasing={}",
        "mixing={}",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OPTIONS)
def test_a_run_with_an_option_resumes_bit_by_bit(case: str, tmp_path: Path) -> None:
    """It also learns other weights than a run without the option."""
    recipe = short_recipe(*PLAIN, *OPTIONS[case])
    train_recipe(recipe, tmp_path / "whole")
    interrupt(recipe, tmp_path / "parts", "step", 1, 3)
    train_recipe(recipe, tmp_path / "parts", resume=True)
    assert same_run(tmp_path / "whole", tmp_path / "parts")

    train_recipe(short_recipe(*PLAIN), tmp_path / "plain")
    assert not same_run(tmp_path / "whole", tmp_path / "plain")


@pytest.mark.nightly
def test_a_compiled_run_resumes_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps have 69, 68 and 68 images; the resumed run begins with those of another size."""
    # torch compiles in this thread, so that no compiler outlasts the test on a busy machine.
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    pooled = "model.config={base_width=4, pooling={kind='isqrt', width=8}}"
    recipe = short_recipe(*PLAIN, "epochs=1", "batch_size=100", "compile=true", pooled)
    train_recipe(recipe, tmp_path / "whole")
    torch.compiler.reset()
    interrupt(recipe, tmp_path / "parts", "step", 0, 0)
    torch.compiler.reset()  # as in another process
    train_recipe(recipe, tmp_path / "parts", resume=True)

    assert same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_network_that_torch_cannot_compile_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TorchDynamoException("no compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    with pytest.raises(TrainingError, match=r"^compile: .*: no compiler"):
        train_recipe(short_recipe(*PLAIN, "compile=true"), tmp_path / "run")


def test_a_checkpoint_has_the_scale_of_fp16_alone(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16", "fp16"):
        recipe = short_recipe(*PLAIN, "epochs=1", f"precision={precision}")
        train_recipe(recipe, tmp_path / precision)
        state: Any = read_checkpoint(tmp_path / precision / "last.pt").resume
        assert ("scaler" in state) == (precision == "fp16")
        assert {value.dtype for value in state["weights"].values()} <= {
            torch.float32,
            torch.int64,
        }


@pytest.mark.parametrize(
    "model",
    ["{name='dsop-resnet8'}", "{name='resnet8', config={pooling={kind='isqrt', width=8}}}"],
)
def test_second_order_layers_compute_in_float32_if_the_run_has_fp16(model: str) -> None:
    run, batch = one_process_run(short_recipe(f"model={model}", "precision=fp16"))
    types = set()
    for module in run.model.modules():
        if isinstance(module, ISqrtCov):
            module.register_forward_hook(lambda *call: types.add(call[2].dtype))
    step = train_step(run, batch, num_samples=len(batch[1]), steps=6)

    assert types == {torch.float32}
    assert step.loss.total.isfinite()
    assert float(step.norm) > 0


def test_a_gradient_that_overflows_in_fp16_leaves_out_the_step() -> None:
    run, batch = one_process_run(short_recipe(*PLAIN, "precision=fp16"))
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.updates.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    train_step(run, batch, num_samples=len(batch[1]), steps=6)

    assert all(torch.equal(value, before[name]) for name, value in run.model.named_parameters())
    assert run.updates.scaler.get_scale() == 2.0**119
    run.position.step += 1
    assert np.isfinite(run.read_steps()).all()
    assert np.isfinite(run.position.gradient)


def test_a_gradient_that_is_never_finite_in_fp16_is_an_error() -> None:
    run, batch = one_process_run(short_recipe(*PLAIN, "precision=fp16"))
    run.updates.scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    run.unread.append(train_step(run, batch, num_samples=len(batch[1]), steps=6))
    run.position.step += 1

    with pytest.raises(TrainingError, match=r"finite in fp16"):
        run.read_steps()


def test_accumulated_gradients_are_the_gradient_of_the_step() -> None:
    """Without batch norm, the parts of a step do not depend on each other."""
    gradients = []
    for number in (1, 4):
        recipe = short_recipe(*PLAIN, f"grad_accum_steps={number}")
        run, batch = one_process_run(recipe)
        for module in run.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        train_step(run, batch, num_samples=len(batch[1]), steps=6)
        gradients.append([parameter.grad for parameter in run.parameters])
    for whole, accumulated in zip(*gradients, strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-6)


SMALL_GATE = "components=4, chosen=2, component_widths=[6], gate_widths=[], balance_weight=100"
GATED = {
    "gmsop": [
        "model.name=gmsop-16-8-resnet18",
        f"model.config={{{SMALL_GATE}, blocks_per_stage=1, conv5_stride=1, dropout=0}}",
    ],
    "gmsop-head": [
        "model.name=gmsop-head:resnet8",
        "model.config={head={components=4, chosen=2, balance_weight=100}}",
        "start.weights=none",
    ],
}


@pytest.mark.parametrize("case", GATED)
def test_parts_with_the_same_load_have_the_balance_loss_of_the_step(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All images are the same one, and so are the loads of all parts."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # the noise of the gate
    losses, gradients = [], []
    for number in (1, 2, 3, 8):
        run, (pixels, labels) = one_process_run(
            short_recipe(*GATED[case], f"grad_accum_steps={number}")
        )
        for module in run.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
                module.eval()
        batch = (pixels[:1].expand_as(pixels), labels[:1].expand_as(labels))
        step = train_step(run, batch, num_samples=len(labels), steps=6)

        losses.append(float(step.loss.parts["balance"]))
        gradients.append([parameter.grad for parameter in run.parameters])

    assert losses[0] > 0.1
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-4)
    for accumulated in gradients[1:]:
        for part, whole in zip(accumulated, gradients[0], strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-5)


def test_losses_of_parts_add_up_also_if_some_have_other_penalties() -> None:
    one = torch.tensor(1.0)
    total, parts, counts = sum_losses(
        [
            Loss(one, {"main": one}, torch.tensor([1, 2])),
            Loss(one, {"main": one, "balance": one}, torch.tensor([3, 0])),
        ]
    )

    assert (float(total), {name: float(part) for name, part in parts.items()}) == (
        2.0,
        {"main": 2.0, "balance": 1.0},
    )
    assert counts is not None
    assert counts.tolist() == [4, 2]


REFUSED = {
    "nothing to mix by": (["mixing={mixup=0, cutmix=0}"], "mixing: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_fit_together_are_refused(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        short_recipe(*PLAIN, *settings)


def test_a_step_must_have_a_sample_for_each_part(tmp_path: Path) -> None:
    recipe = short_recipe(*PLAIN, "grad_accum_steps=40")
    with pytest.raises(ConfigError, match=r"^grad_accum_steps: .* 34 .* 40"):
        train_recipe(recipe, tmp_path / "run")


IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("labels", ["single", "multiple"])
@pytest.mark.parametrize("kind", [{"cutmix": 0.0}, {"mixup": 0.0}, {}], ids=str)
def test_targets_of_mixed_images_are_their_shares(labels: str, kind: dict[str, float]) -> None:
    """An odd number of images: the last one stays as it is."""
    classes = torch.tensor([0, 1, 2, 0, 1])
    is_multi_label = labels == "multiple"
    given = torch.nn.functional.one_hot(classes, 3).float() if is_multi_label else classes
    images = IMAGES.clone()
    with seeded(3):
        targets = Mixing(**kind).mix(images, given, 3, is_multi_label=is_multi_label)

    torch.testing.assert_close(targets.sum(dim=1), torch.ones(5))
    assert targets[4].tolist() == [0, 1, 0]
    assert torch.equal(images[4], IMAGES[4])
    assert not torch.equal(images[:4], IMAGES[:4])


def test_random_choices_depend_on_the_seed_and_leave_global_generators_alone() -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    images = ArrayImages(("a", "b"), np.stack([array, array]), np.array([0, 1]))
    rules = Preprocess(resize=16, crop=16)
    augment = CenterCrop(kind="center")

    def pixels(seed: int, epoch: int) -> bytes:
        change = RandAugment(num_ops=4)
        data = AugmentedDataset(images, augment, rules, seed, epoch, rand_augment=change)
        return data.pixels([0, 1]).tobytes()

    random.seed(5)
    expected = random.random()
    random.seed(5)
    drawn = [pixels(0, 0), pixels(0, 0), pixels(0, 1), pixels(1, 0)]
    assert random.random() == expected
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3

    erased = []
    settings = Augmentations(augment=augment, random_erasing=RandomErasing(probability=1))
    for seed in (1, 1, 2):
        changed = IMAGES.clone()
        torch.manual_seed(0)
        labels = torch.arange(5)
        targets = settings.change_batch(changed, labels, 5, is_multi_label=False, seed=seed)
        assert targets is labels
        erased.append(changed)
    assert torch.equal(erased[0], erased[1])
    assert not torch.equal(erased[0], erased[2])
