"""Networks outside of the catalog are exported with a proof, or rejected with one line on the cause."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sopdeploy.errors import SopdeployError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.pipeline import ExportOptions
from sopdeploy_export.user_network.checks import check_builder
from sopdeploy_export.user_network.export_network import export_network, unused_modules
from sopdeploy_service.commands.verify import verify
from tests.export.user_network import networks as n

SIDE = 12
PREPROCESS = Preprocess(resize=SIDE, crop=SIDE)
LABELS = tuple("abcd")
Build = Callable[[], nn.Module]


def run(trained: nn.Module, destination: Path, **options: Any) -> Any:
    options.setdefault("plain", None)
    options.setdefault("labels", LABELS)
    return export_network(trained, preprocess=PREPROCESS, destination=destination, name="small", **options)


def plain() -> nn.Module:
    return n.Small(aux=False)


AUX = {"plain": plain, "training_only": ["aux*"]}
ACCEPTED: dict[str, tuple[Build, dict[str, Any], str]] = {
    "an auxiliary head": (n.Small, AUX, "three-way"),
    "without a plain network": (n.Small, {"training_only": ["aux"]}, "trained-detached"),
    "nothing to detach": (plain, {"plain": plain}, "trained-plain"),
    "nothing to compare with": (plain, {}, "trained-only"),
    "a teacher": (
        n.WithTeacher,
        {"plain": lambda: n.WithTeacher(aux=False), "training_only": ["teacher"]},
        "three-way",
    ),
    "a distilled network": (n.Distilled, {"plain": n.Distilled}, "trained-plain"),
    "a list of exits": (
        lambda: n.variant(n.exits, aux=False),
        {"plain": lambda: n.variant(n.exits, aux=False), "logits": -1},
        "trained-plain",
    ),
    "a dict": (lambda: n.variant(n.as_dict, aux=False), {"logits": "out"}, "trained-only"),
    "a named tuple": (lambda: n.variant(n.as_named_tuple, aux=False), {"logits": "scores"}, "trained-only"),
    "averaged weights": (lambda: torch.optim.swa_utils.AveragedModel(n.Small()), AUX, "three-way"),
    "data parallel": (lambda: nn.DataParallel(n.Small()), AUX, "three-way"),
    "synchronized batch norm": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(n.Small()),
        {"training_only": ["aux"]},
        "trained-detached",
    ),
    "channels last": (lambda: n.Small().to(memory_format=torch.channels_last), AUX, "three-way"),
    "weight norm": (
        lambda: n.weight_norm(n.Small()),
        {"plain": lambda: n.weight_norm(n.Small(aux=False)), "training_only": ["aux"]},
        "three-way",
    ),
    "second-order pooling": (n.SecondOrder, {"plain": n.SecondOrder}, "trained-plain"),
    "renamed": (
        lambda: nn.Sequential(plain()),
        {"plain": plain, "rename": lambda name: name.removeprefix("0.")},
        "trained-plain",
    ),
}
IN_THE_DEFAULT_RUN = ("an auxiliary head", "renamed")


@pytest.mark.parametrize(
    "case",
    [name if name in IN_THE_DEFAULT_RUN else pytest.param(name, marks=pytest.mark.slow) for name in ACCEPTED],
)
def test_it_is_exported_and_verified_with_the_strength_of_its_proof(case: str, tmp_path: Path) -> None:
    build, options, proof = ACCEPTED[case]
    network = n.trained(build()).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    attributes = set(vars(network))
    exported = run(network, tmp_path, **options)
    assert exported.certificate.proof == exported.summary()["proof"] == proof
    assert exported.warnings == ()
    verify(exported.path)
    assert network.training, "the user's network is not changed"
    assert set(vars(network)) == attributes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    if case == "second-order pooling":
        assert exported.lowering.rules


def other_network() -> nn.Module:
    found = plain()
    found.stem[2] = nn.LeakyReLU(0.1)
    return found


def renamed_plain() -> nn.Module:
    found = plain()
    found.head = found.fc
    del found.fc
    return found


SHARED = plain()
SLOW = ("torch.cond", "a builder that returns one object", "a builder that fails")
REJECTED: dict[str, tuple[Build, dict[str, Any], str]] = {
    "y + 0 * aux": (
        lambda: n.variant(n.leaks),
        AUX,
        r"output of the trained network depends on aux\.(bias|weight)",
    ),
    "a leak at batch 1": (
        lambda: n.variant(n.leaks_at_batch_one),
        AUX,
        r"depends on aux\.bias, aux\.weight",
    ),
    "a distilled head": (n.Distilled, AUX, r"depends on aux.*cannot be detached"),
    "a buffer written by a branch": (n.WritesBuffer, {}, r"seen.*stateless|writes to.*seen"),
    "a frozen buffer that the plain network lacks": (
        n.BufferOfBranch,
        AUX,
        r"still has centers, which the plain one lacks",
    ),
    "an alias of a kept module": (
        n.Alias,
        AUX,
        r"aux\.weight was removed but shares its memory with fc\.weight",
    ),
    "a replaced forward": (
        lambda: n.patched(n.Small()),
        AUX,
        r"^forward of the trained network was replaced",
    ),
    "another network with the same names": (
        n.Small,
        {"plain": other_network, "training_only": ["aux"]},
        r"is not the plain one.*relu",
    ),
    "a renamed plain network": (n.Small, {"plain": renamed_plain, "training_only": ["aux"]}, r"needs head"),
    "a counter": (n.Counter, {}, r"^calls changes while the trained network runs"),
    "features stored on the module": (n.Stores, {}, r"^last changes while"),
    "Monte Carlo dropout": (lambda: n.variant(n.monte_carlo), {}, r"random numbers"),
    "squeeze at batch 1": (lambda: n.variant(n.squeezes), {}, r"drops the batch dimension"),
    "a branch on values": (lambda: n.variant(n.branches_on_values), {}, r"cannot be captured"),
    "torch.cond": (lambda: n.variant(n.uses_cond, aux=False), {}, r"cond|control flow|captured"),
    "NumPy": (lambda: n.variant(n.uses_numpy), {}, r"numpy|captured"),
    "a hook": (lambda: n.hooked(n.Small()), {}, r"forward hook"),
    "a module stuck in train mode": (lambda: n.with_dropout(n.Small()), {}, r"train mode \(stem\.3\)"),
    "NaN": (lambda: n.with_nan(n.Small()), {}, r"^stem\.0\.weight holds NaN"),
    "half precision": (lambda: n.Small().half(), {}, r"^stem\.0\.weight is float16; call \.float\(\)"),
    "a ScriptModule": (lambda: torch.jit.script(plain()), {}, r"is a ScriptModule"),
    "lazy modules": (n.lazy, {}, r"^fc of the trained network is not initialized"),
    "too few labels": (plain, {"labels": ("a", "b")}, r"4 logits, but there are 2 labels"),
    "one input channel": (lambda: nn.Sequential(nn.Conv2d(1, 4, SIDE), nn.Flatten()), {}, r"1 channels"),
    "a dict without a name": (
        lambda: n.variant(n.as_dict),
        {},
        r"a dict with 'out', 'features'; choose one with --logits",
    ),
    "a dict with another name": (lambda: n.variant(n.as_dict), {"logits": "y"}, r"without logits 'y'"),
    "a builder that fails": (n.Small, {"plain": lambda: 1 / 0}, r"builder of the plain network fails: Zero"),
    "a builder that returns one object": (plain, {"plain": lambda: SHARED}, r"same module"),
    "a part that does not exist": (
        n.Small,
        {"training_only": ["head*"]},
        r"no such part; the network has stem",
    ),
    "unused weights in network.pt2": (
        n.Small,
        {"options": ExportOptions(pt2=True)},
        r"does not depend on aux;",
    ),
    "a name with a slash": (n.Small, {"name": "a/b"}, r"name a/b: use letters"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in REJECTED]
)
def test_it_is_rejected_with_the_cause_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    build, options, message = REJECTED[case]
    network = build()
    if case not in ("NaN", "half precision", "a ScriptModule", "lazy modules"):
        n.trained(network)
    options = {"name": "small", "plain": None, "labels": LABELS} | options
    with pytest.raises(SopdeployError, match=message) as error:
        export_network(network, preprocess=PREPROCESS, destination=tmp_path, **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_unused_part_and_a_softmax_are_warnings(tmp_path: Path) -> None:
    network = n.trained(n.variant(n.probabilities))
    assert unused_modules(network, PREPROCESS) == ("aux",)
    exported = run(network, tmp_path)
    assert exported.warnings == (
        "the trained network ends in a softmax, and the service applies another one: export the network "
        "without it",
        "the output does not depend on aux; name it as training-only to prove its removal",
    )


def test_a_builder_that_copies_the_trained_network_shares_nothing() -> None:
    check_builder(plain, plain())
