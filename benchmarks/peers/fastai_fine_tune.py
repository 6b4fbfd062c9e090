"""fastai's `fine_tune` on the photographs of a request; `benchmarks/own_photos.py` starts this program.

    python fastai_fine_tune.py REQUEST ANSWER      # with the Python of an environment with fastai and timm

REQUEST is a JSON file: `train` [[file, class], ...], `test` [file, ...], `network` (timm's name), `weights`
(its state dict), `seed`, `options`. ANSWER gets `seconds`, the processor seconds from the start of the
process to the end of the training, and `predicted`, a class for each test file. `options`: `epochs`,
`freeze_epochs`, `batch`, `rate` (0: the valley that `lr_find` suggests), `crop`, the `min_scale` of
`RandomResizedCrop`, which `aug_transforms()` follows, `freeze_norms` (batch norms of the network keep their
statistics and weights, also after `unfreeze`) and `learner`, options of `vision_learner`.
"""

import importlib
import json
import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import timm  # type: ignore[import-untyped,unused-ignore]
from fastai.vision.all import (  # type: ignore[import-not-found,unused-ignore]
    ImageDataLoaders,
    RandomResizedCrop,
    aug_transforms,
    set_seed,
    vision_learner,
)

SIDE = 224


def processor_seconds() -> float:
    """Return the processor seconds of this process and of its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def main(request_file: Path, answer_file: Path) -> None:
    """Train, predict and write the answer."""
    request: dict[str, Any] = json.loads(request_file.read_text(encoding="utf-8"))
    options = request["options"]
    # The published weights come from a file instead of a download.
    load = partial(timm.create_model, pretrained_cfg_overlay={"file": request["weights"]})
    timm.create_model = load
    if options["freeze_norms"]:
        layers: Any = importlib.import_module("timm.layers")  # untyped
        timm.create_model = lambda *args, **named: layers.freeze_batch_norm_2d(load(*args, **named))
    set_seed(request["seed"])
    files, labels = zip(*request["train"], strict=True)
    loaders = ImageDataLoaders.from_lists(
        "/",
        list(files),
        list(labels),
        valid_pct=0,
        item_tfms=RandomResizedCrop(SIDE, min_scale=options["crop"]),
        batch_tfms=aug_transforms(),
        bs=options["batch"],
        num_workers=0,
    )
    learner = vision_learner(loaders, request["network"], **options["learner"]).to_channelslast(use_amp=False)
    rate = options["rate"]
    with learner.no_bar(), learner.no_logging():
        if not rate:
            rate = float(learner.lr_find(show_plot=False).valley)
        learner.fine_tune(options["epochs"], base_lr=rate, freeze_epochs=options["freeze_epochs"])
        seconds = processor_seconds()
        test = loaders.test_dl(request["test"], bs=32, num_workers=0)
        scores, _ = learner.get_preds(dl=test)
    predicted = [loaders.vocab[int(index)] for index in scores.argmax(dim=1)]
    answer_file.write_text(json.dumps({"seconds": seconds, "predicted": predicted, "rate": rate}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
