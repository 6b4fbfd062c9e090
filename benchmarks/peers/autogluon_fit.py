"""AutoGluon's `MultiModalPredictor` on the photographs of a request; `benchmarks/own_photos.py` starts this.

    python autogluon_fit.py REQUEST ANSWER      # with the Python of an environment with autogluon.multimodal

REQUEST and ANSWER are those of `fastai_fine_tune.py`. `options`: `problem_type` ("multiclass" fine-tunes the
network, "few_shot_classification" fits a support vector machine on its features) and `hyperparameters`,
which are added to the network's.
"""

import json
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped,unused-ignore]
from autogluon.multimodal import MultiModalPredictor  # type: ignore[import-not-found,unused-ignore]
from autogluon.multimodal.models import timm_image  # type: ignore[import-not-found,unused-ignore]


def processor_seconds() -> float:
    """Return the processor seconds of this process and of its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main(request_file: Path, answer_file: Path) -> None:
    """Train, predict and write the answer."""
    request: dict[str, Any] = json.loads(request_file.read_text(encoding="utf-8"))
    # The published weights come from a file instead of a download.
    timm_image.create_model = partial(
        timm_image.create_model, pretrained_cfg_overlay={"file": request["weights"]}
    )
    hyperparameters = {
        "model.names": ["timm_image"],
        "model.timm_image.checkpoint_name": request["network"],
        "env.num_gpus": 0,
        "env.num_workers": 0,
        "env.num_workers_inference": 0,
        "env.precision": 32,
        **request["options"].get("hyperparameters", {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        predictor = MultiModalPredictor(
            label="label",
            problem_type=request["options"]["problem_type"],
            hyperparameters=hyperparameters,
            path=str(Path(folder) / "run"),
            enable_progress_bar=False,
            verbosity=1,
        )
        predictor.fit(pd.DataFrame(request["train"], columns=["image", "label"]), seed=request["seed"])
        seconds = processor_seconds()
        predicted = predictor.predict(pd.DataFrame({"image": request["test"]}))
    answer_file.write_text(json.dumps({"seconds": seconds, "predicted": [str(label) for label in predicted]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
