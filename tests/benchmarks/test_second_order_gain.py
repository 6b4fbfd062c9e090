"""The benchmark with small tasks: runs are paired, exported networks are measured, the cache resumes."""

import dataclasses
import io
from pathlib import Path

import pytest
import second_order_gain
import torch
from gain import runs
from gain.gates import gates_on_cifar, kinds
from gain.report import checks, print_studies, results_of
from gain.run import TRUNK, Run, build, exported_network, open_task, train_and_measure
from gain.studies import (
    DSOP,
    HEAD,
    LINEAR,
    PLAIN,
    cifar,
    cifar_branches,
    cifar_rates,
    digits,
    few_textures,
    texture_rates,
    textures,
)
from gain.study import Study
from gain.task import DigitsConfig
from gain.textures import TextureConfig
from rich.console import Console

ARRAYS = Path("cifar10.npz")
EVERY = [
    texture_rates(),
    textures(2, ablations=True),
    few_textures(1),
    digits(2),
    kinds(2, tries=True),
    cifar(ARRAYS, 2, whole=True),
    cifar_branches(ARRAYS, 2),
    cifar_rates(ARRAYS),
    gates_on_cifar(ARRAYS, 1),
]
EVERY_ARM = [pytest.param(study, arm, id=f"{study.name}: {arm}") for study in EVERY for arm in study.arms]


def miniature(*arms: str) -> Study:
    """Build a study of *arms* with two easy tasks, few images and few epochs."""
    study = textures(2, ablations=False)
    return dataclasses.replace(
        study,
        template={**study.template, "task": TextureConfig(train=300, spread=0.5)},
        arms={arm: {**study.arms[arm], "epochs": 12} for arm in arms},
        pairs=(),
        must={arm: points for arm, points in study.must.items() if arm in arms},
    )


@pytest.mark.slow
def test_the_head_wins_linear_features_are_at_chance_and_the_cache_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = miniature(LINEAR, PLAIN, HEAD)
    results = runs.run_studies([study], tmp_path, jobs=1)
    assert [holds for _, holds in checks(study, results[study.name])] == [True, True]

    shown = io.StringIO()
    print_studies([study], results, Console(file=shown, width=200))
    assert "better by" in shown.getvalue()
    assert "2/2" in shown.getvalue()
    head = next(one for one in results_of(study, results[study.name]) if one.case.endswith(HEAD))
    assert head.other is not None
    assert head.ours - head.other > 30

    monkeypatch.setattr(runs, "train_and_measure", lambda run: pytest.fail(f"{run} was repeated"))
    assert runs.run_studies([study], tmp_path, jobs=1) == results


@pytest.mark.parametrize(("study", "arm"), EVERY_ARM)
def test_every_arm_starts_with_the_weights_of_the_plain_network(study: Study, arm: str) -> None:
    run = study.run(arm, 0)
    network, again = build(run).state_dict(), build(run).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in network.items())
    trunk = {key: value for key, value in run.config.items() if key in TRUNK}
    family = "textures" if "textures" in run.network else "resnet"
    plain = build(run.model_copy(update={"network": family, "config": trunk})).state_dict()
    same = [name for name in network if name in plain and network[name].shape == plain[name].shape]
    assert same
    assert all(torch.equal(network[name], plain[name]) for name in same)


@pytest.mark.parametrize(
    ("run", "training_only"),
    [
        (miniature(DSOP).run(DSOP, 0), "branches"),
        (kinds(1, tries=False).run("gate, 2 of 4", 0), "gate.noise"),
    ],
    ids=["branches", "gate noise"],
)
def test_the_measured_network_is_the_trained_one_without_training_only_modules(
    run: Run, training_only: str
) -> None:
    network = build(run)
    images = open_task(run).test[:8]
    network.train()(images)  # updates the batch norms
    exported = exported_network(network, run)
    assert not [name for name, _ in exported.named_modules() if name.startswith(training_only)]
    assert torch.equal(exported(images), network.eval()(images))


def test_a_damaged_result_is_recomputed(tmp_path: Path) -> None:
    run = Run(task=DigitsConfig(), network="textures", config={}, epochs=1, learning_rate=0.1, seed=0)
    run = run.model_copy(update={"task": TextureConfig(train=64)})
    outcome = train_and_measure(run)
    runs.write_cached(tmp_path, run, outcome)
    assert runs.read_cached(tmp_path, run) == outcome
    (tmp_path / f"{run.key}.json").write_text("{", encoding="utf-8")
    assert runs.read_cached(tmp_path, run) is None
    assert runs.read_cached(None, run) is None


def test_the_key_of_a_run_does_not_depend_on_the_location_of_the_images() -> None:
    here, there = (cifar(Path(place), 1, whole=False).run(HEAD, 0) for place in ("a.npz", "b.npz"))
    assert here.key == there.key
    keys = [run.key for study in EVERY for _, _, run in study.runs()]
    assert len(set(keys)) == len({run.model_dump_json() for study in EVERY for _, _, run in study.runs()})


def test_a_missing_gain_fails() -> None:
    study = miniature(LINEAR, PLAIN, HEAD)
    poor = runs.Outcome(accuracy=20.0, seconds=1.0, loss=1.0)
    found = checks(study, {arm: [poor, poor] for arm in study.arms})
    assert [holds for _, holds in found] == [False, False]


def test_cifar_needs_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        second_order_gain.main(["--cifar", str(tmp_path)])
    assert left.value.code == 2
    assert "--cifar needs --cache" in capsys.readouterr().err
