"""Log loss and accepted fraction of a bundle, on images that its temperature was not fitted to.

Converts published weights, fits temperature and rejection threshold to one half of a folder of labeled images
(every second one of each class), exports, and measures the bundle on the other half.

    python benchmarks/calibration.py --weights FILE --as NAME --data DIR [--option KEY=VALUE] [--quick]

`--data` holds one subfolder per class with the names that `sopdeploy import` gives the classes.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import Result, existing, make_parser, one_line_errors, report
from numpy.typing import NDArray

from sopdeploy.checkpoint import build_classifier, read_checkpoint, write_checkpoint
from sopdeploy.data.batches import sequential_batches
from sopdeploy.decision import Decision, log_sum_exp
from sopdeploy.evaluation.decision_fit import fit_decision
from sopdeploy.evaluation.metrics import log_loss
from sopdeploy.evaluation.prediction import predict_logits
from sopdeploy.files import check_is_weights
from sopdeploy.importers.import_weights import import_weights
from sopdeploy.photos.folder import open_evaluation_images
from sopdeploy.photos.photo import PreprocessedDataset
from sopdeploy.training.recipe_files import parse_override
from sopdeploy_export.pipeline import export_checkpoint
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings

BATCH = 50
QUICK = 10  # every tenth image


class Measured(NamedTuple):
    """The fitted decision, and logits (N, C) and classes (N,) of the other half of the images.

    `raw` contains the logits of the network without temperature, `shipped` the logits of the bundle.
    """

    decision: Decision
    raw: NDArray[np.float64]
    shipped: NDArray[np.float64]
    targets: NDArray[np.int64]


def measure(weights: Path, name: str, settings: dict[str, Any], data: Path, every: int) -> Measured:
    """Use every *every*-th image in *data*: fit to one half, export, and run the bundle on the other half."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ckpt.pt"
        import_weights(check_is_weights(weights), name, path, settings)
        checkpoint = read_checkpoint(path)
        images, network = open_evaluation_images(data, checkpoint.labels), build_classifier(checkpoint, path)
        indices = np.arange(len(images))
        fitted, others = (
            PreprocessedDataset(images.select(indices % (2 * every) == start), checkpoint.preprocess)
            for start in (0, every)
        )
        decision = fit_decision(
            *predict_logits(network, fitted, checkpoint.preprocess), estimated_on="held-out"
        )
        write_checkpoint(path, replace(checkpoint, decision=decision))
        runtime = load_model(export_checkpoint(path, Path(folder) / "bundles").path, Settings()).runtime
        shipped = [
            runtime.run(others.pixels(batch))["logits"] for batch in sequential_batches(len(others), BATCH)
        ]
        raw, targets = predict_logits(network, others, checkpoint.preprocess)
    return Measured(decision, raw, np.concatenate(shipped).astype(np.float64), targets)


def results(measured: Measured) -> list[Result]:
    """Compare the bundle with the network without temperature."""
    decision, raw, shipped, targets = measured
    if decision.rejection is None:
        raise SystemExit("too few images for a threshold; give more")
    known = log_sum_exp(shipped) >= decision.rejection.threshold
    difference = float(np.abs(shipped - raw / decision.temperature).max())
    return [
        Result(
            case="log loss",
            against="no temperature",
            ours=log_loss(shipped, targets),
            other=log_loss(raw, targets),
            unit="nats",
            runs=1,
        ),
        Result(case="accepted known images", ours=100 * float(known.mean()), unit="%", runs=1),
        Result(case="largest difference from scaled logits", ours=difference, unit="logits", runs=1),
    ]


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--weights", type=existing, required=True, help="published weights")
    parser.add_argument("--as", dest="name", required=True, help="a name of `sopdeploy models`")
    parser.add_argument("--option", action="append", default=[], help="KEY=VALUE, an option of the network")
    parser.add_argument("--data", type=existing, required=True, help="labeled images, DIR/<class>/*.jpg")
    parser.add_argument("--quick", action="store_true", help="every tenth image")
    arguments = parser.parse_args()
    settings = dict(map(parse_override, arguments.option))
    every = QUICK if arguments.quick else 1
    with one_line_errors():
        measured = measure(arguments.weights, arguments.name, settings, arguments.data, every)
    facts = {
        "network": arguments.name,
        "images": len(measured.targets),
        "top1": round(float((measured.shipped.argmax(axis=1) == measured.targets).mean()), 4),
        "temperature": round(measured.decision.temperature, 4),
    }
    report(results(measured), as_json=arguments.json, **facts)


if __name__ == "__main__":
    main()
