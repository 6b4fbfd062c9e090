"""The benchmark with small tasks: runs are paired, exported networks are measured, the cache resumes."""

import dataclasses
import io
from pathlib import Path

import pytest
import torch
from gain import runs
from gain.gates import kinds
from gain.report import checks, print_studies, results_of
from gain.run import Run, build, exported_network, open_task
from gain.studies import (
    DSOP,
    HEAD,
    LINEAR,
    PLAIN,
    textures,
)
from gain.study import Study
from gain.textures import TextureConfig
from rich.console import Console


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
