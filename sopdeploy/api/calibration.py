"""Fit temperature and thresholds of an existing checkpoint: `sopdeploy.calibrate`, `sopdeploy calibrate`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sopdeploy.api.options import CalibrateOptions
from sopdeploy.checkpoint import build_classifier, read_checkpoint, write_checkpoint
from sopdeploy.config import expand_options
from sopdeploy.data.base import PreprocessedDataset
from sopdeploy.data.datasets.layouts import open_evaluation_images
from sopdeploy.data.image_files import unreadable_images_error
from sopdeploy.decision import Decision, sigmoid
from sopdeploy.errors import ConfigError, DataError, TrainingError
from sopdeploy.evaluation.decision_fit import MIN_IMAGES, fit_decision
from sopdeploy.evaluation.multi_label import fit_presence
from sopdeploy.evaluation.prediction import predict_logits
from sopdeploy.files import expand_user


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """Result of `calibrate`: the new checkpoint and the fitted values.

    Attributes:
        path: The new checkpoint.
        decision: The fitted temperature and rejection threshold, or with several classes per image the
            thresholds.
        num_images: Number of images.
        labels: Class names in output order.
        training_only: The network has parts that `export` detaches.
        notes: Lines about the images that are not as expected, such as classes without images.
    """

    path: Path
    decision: Decision
    num_images: int
    labels: tuple[str, ...]
    training_only: bool
    notes: tuple[str, ...] = ()


@expand_options
def calibrate(
    checkpoint: str | Path,
    data: str | Path,
    out_file: str | Path | None = None,
    *,
    options: CalibrateOptions,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> Calibrated:
    """Fit temperature and rejection threshold of a checkpoint to images, and write a new checkpoint.

    `train` does this at the end of a run; use `calibrate` for imported weights, or for other images. Fitted
    values that the checkpoint already contains are replaced. A network that predicts several classes per
    image gets a threshold per class instead.

    Args:
        checkpoint: A checkpoint of `train` or of `sopdeploy import`.
        data: Images that were not used for training, `DIR/<class>/*.jpg` or with `labels.csv`.
        out_file: The checkpoint to write; the default is `<name>-calibrated.pt` next to *checkpoint*.
        options: The fields of `CalibrateOptions`, each as a keyword argument.
        on_image: Called with the numbers of images done and in total.

    Raises:
        ConfigError: *out_file* is the checkpoint itself, or an option is invalid.
        CheckpointError: The checkpoint cannot be read.
        DataError: The classes do not match, an image cannot be read, or there are fewer than 50 images.
        TrainingError: The outputs of the network are not finite.
    """
    source, folder = Path(checkpoint), expand_user(data)
    read = read_checkpoint(source)
    destination = source.with_name(f"{source.stem}-calibrated.pt") if out_file is None else Path(out_file)
    if destination.exists() and source.exists() and destination.samefile(source):
        raise ConfigError(
            "is the checkpoint to calibrate; give another name", setting="out_file", value=str(destination)
        )
    multi_label = read.decision is not None and read.decision.thresholds is not None
    notes: list[str] = []
    images = open_evaluation_images(folder, read.labels, multi_label=multi_label, log=notes.append)
    if not multi_label and len(images) < MIN_IMAGES:
        raise DataError(f"{folder}: has {len(images)} images; give at least {MIN_IMAGES} to fit to")
    if warning := read.trained_on(images):
        notes.append(f"{folder}: {warning}")
    network = build_classifier(read, source).to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        logits, targets = predict_logits(
            network,
            PreprocessedDataset(images, read.preprocess),
            read.preprocess,
            workers=options.workers,
            on_batch=lambda done: on_image(done, len(images)),
        )
    except DataError as error:
        raise unreadable_images_error(error, images) from None
    if not np.isfinite(logits).all():
        raise TrainingError("the logits are not finite; train again with a lower learning rate")
    if multi_label:
        decision = fit_presence(targets.astype(np.float64), sigmoid(logits))
    else:
        scalable = network.logits_layer() is not None
        decision = fit_decision(
            logits, targets, estimated_on="held-out", accepts=options.accepts, scalable=scalable
        )
    write_checkpoint(destination, replace(read, decision=decision))
    return Calibrated(
        path=destination,
        decision=decision,
        num_images=len(images),
        labels=read.labels,
        training_only=bool(network.training_only),
        notes=tuple(notes),
    )
