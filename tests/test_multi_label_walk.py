"""Several classes per image from the outside: train, export, serve, and evaluate all three equally."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sopdeploy
from sopdeploy.client import Client
from tests.two_objects import CLASSES, draw_scenes

SETTINGS = {
    "model.name": "dsop-resnet8",
    "threads": 1,
    "preprocess.resize": 32,
    "preprocess.crop": 32,
}


RECIPES = {
    "photos-dsop": {**SETTINGS, "epochs": 8, "loss.label_smoothing": 0.0},
    "photos": {**SETTINGS, "start.weights": "none"},  # frozen features
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_objects_reach_a_map_of_95_percent_through_export_and_http(tmp_path: Path, recipe: str) -> None:
    scenes = draw_scenes(tmp_path / "scenes")
    unseen = draw_scenes(tmp_path / "unseen", seed=1)
    run = sopdeploy.train(scenes, recipe, tmp_path / "run", **RECIPES[recipe])
    assert (run.procedure.kind == "loop", len(run.decision.thresholds)) == (recipe == "photos-dsop", 4)
    exported = sopdeploy.export(run.best, tmp_path / "bundles", detach=bool(run.training_only))
    manifest = json.loads((exported.path / "manifest.json").read_bytes())
    assert manifest["decision"]["activation"] == "sigmoid"
    with sopdeploy.serve(exported.path, background=True, port=0, threads=1) as server:
        with Client(server.url) as client:
            client.wait_ready()
            best = client.classify(unseen / "images" / "0.png", threshold=0.0)
            assert sorted(entry.label for entry in best.classes) == list(CLASSES)
        found = [sopdeploy.evaluate(source, unseen) for source in (run.best, exported.path, server.url)]
    maps = [one.metrics.map for one in found]
    assert min(maps) >= 0.95
    assert max(maps) - min(maps) < 1e-6
    assert found[1].metrics == found[2].metrics
    done = subprocess.run(
        [sys.executable, "-m", "sopdeploy", "eval", run.best, "--data", unseen],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("mAP ")
    assert "top-1" not in done.stdout
