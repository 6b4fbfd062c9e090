"""scikit-learn's logistic regression on the averaged features of a frozen network of timm.

    python probe.py REQUEST ANSWER

REQUEST and ANSWER are those of `fastai_fine_tune.py`. `options`: `C`, the inverse regularization, and
`cache`, a file that stores the features of the test photographs, which are the same for all draws. Features
are standardized with the training photographs.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

BATCH = 16


@torch.inference_mode()
def features(network: torch.nn.Module, files: Sequence[str]) -> NDArray[np.float32]:
    """Compute the averages (N, C) in front of the classifier, of center crops."""
    data: Any = timm.data  # without types
    transform = data.create_transform(**data.resolve_data_config(model=network))
    batches = []
    for start in range(0, len(files), BATCH):
        images = [ImageOps.exif_transpose(Image.open(file)) for file in files[start : start + BATCH]]
        batch = torch.stack([transform(image.convert("RGB")) for image in images])
        batches.append(network(batch.contiguous(memory_format=torch.channels_last)).numpy())
    return np.concatenate(batches)


def main(request_file: Path, answer_file: Path) -> None:
    """Train, predict and write the answer."""
    request: dict[str, Any] = json.loads(request_file.read_text(encoding="utf-8"))
    options = request["options"]
    network = timm.create_model(
        request["network"],
        pretrained=True,
        num_classes=0,
        pretrained_cfg_overlay={"file": request["weights"]},
    )
    network = network.eval().to(memory_format=torch.channels_last)
    files, labels = zip(*request["train"], strict=True)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=options["C"], max_iter=5000))
    probe.fit(features(network, files), labels)
    seconds = time.process_time()
    stored = Path(options["cache"])
    if not stored.exists():
        np.save(stored, features(network, request["test"]))
    predicted = probe.predict(np.load(stored)).tolist()
    answer_file.write_text(json.dumps({"seconds": seconds, "predicted": predicted}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
