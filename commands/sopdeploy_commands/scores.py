"""`sopdeploy eval` of a bundle: evaluate it with the server's code, without a server.

Images run one by one, as in `predict`, so that a prediction does not depend on other images.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sopdeploy.base.project import AS_IT_IS, MAX_RECORDED
from sopdeploy.bundle.decision import Decision, have_answers
from sopdeploy.data.folders.evaluation_images import open_evaluation_images
from sopdeploy.data.photos.file_checks import describe_seen
from sopdeploy.data.photos.files import Log
from sopdeploy.data.photos.photo import ImageFiles
from sopdeploy.errors import DataError, ImageError
from sopdeploy.evaluation.decision_fit import check_are_enough, fit_to_images
from sopdeploy.evaluation.predictions import Predictions, make_predictions
from sopdeploy.images.decode import decode
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.runtime.base import translating_errors
from sopdeploy_service.settings import Settings, load_settings


class BundleScores(NamedTuple):
    """The predictions of a bundle with the sorted `labels` they refer to, and the fitted decision, if any.

    `facts` are the names of bundle, runtime and device.
    """

    labels: tuple[str, ...]
    predictions: Predictions
    facts: dict[str, str]
    decision: Decision | None


def scores_of_bundle(
    path: Path,
    data: Path,
    *,
    settings: Settings | None = None,
    accepts: float | None = None,
    mirror: bool = False,
    on_image: Callable[[int, int], None],
    log: Log = lambda _line: None,
) -> BundleScores:
    """Score the bundle at *path* on the images below *data*, one subfolder per class or `labels.csv`.

    With *accepts*, a decision is fitted to these images, as by `score_checkpoint`. *log* receives lines
    about the folder. Raises `DataError` for folders that are not classes of the network, for images that
    cannot be decoded within the limits of *settings*, and for too few images to fit to.
    """
    settings = settings or load_settings()
    loaded = load_model(path, settings)

    labels = loaded.bundle.labels
    decision = loaded.bundle.manifest.decision
    sorted_labels = tuple(sorted(labels))
    multi_label = loaded.bundle.manifest.rules.is_multi_label

    # Multi-label targets have a column for each logit, in the bundle's order. Other targets are
    # indices of the sorted names; `make_predictions` converts the indices of the logits to
    # them.
    target_labels = labels if multi_label else sorted_labels
    origin = loaded.bundle.manifest.origin
    images = open_evaluation_images(
        data,
        target_labels,
        multi_label=multi_label,
        reading=AS_IT_IS if origin is None else origin.reading,
        log=log,
    )

    if accepts is not None and not multi_label:
        check_are_enough(images)

    # Photographs that trained the network make its scores too good. A full record has the hashes
    # of some training images only.
    if origin is not None:
        is_sample = len(origin.sample) == MAX_RECORDED
        if warning := describe_seen(images, origin.sample, is_sample=is_sample):
            log(f"{data}: {warning}")

    done = itertools.count(1)
    logits = outputs_of_images(
        loaded,
        loaded.bundle.manifest.outputs[0].name,
        images,
        settings,
        lambda: on_image(next(done), len(images)),
        mirror=mirror,
    )

    facts = {
        "bundle": loaded.bundle.name,
        "runtime": loaded.runtime.name,
        "device": loaded.runtime.device,
    }
    fitted = None
    if accepts is not None:
        fitted = fit_to_images(
            logits.astype(np.float64),
            images,
            labels,
            accepts=accepts,
            is_multi_label=multi_label,
        )
    predictions = make_predictions(logits, images, labels, decision)
    return BundleScores(sorted_labels, predictions, facts, fitted)


def outputs_of_images(
    loaded: LoadedModel,
    name: str,
    images: ImageFiles,
    settings: Settings,
    on_image: Callable[[], None],
    *,
    mirror: bool = False,
) -> NDArray[np.float32]:
    """Compute the output *name* (N, C) of *images*, with *mirror* means over them and their mirror images.

    Raises `DataError` for an image that cannot be decoded within the limits of *settings*, and
    for one whose output is not finite.
    """
    manifest = loaded.bundle.manifest
    max_bytes = settings.max_body_bytes
    max_pixels = settings.max_pixels
    rows: list[NDArray[np.float32]] = []
    for index in range(len(images)):
        path = images.path(index)

        try:
            decoded = decode(
                images.read(index),
                manifest.preprocess,
                max_bytes=max_bytes,
                max_pixels=max_pixels,
            )
        except ImageError as error:
            raise DataError(f"{path}: {error}; repair or remove it") from error

        # The image and, with *mirror*, its mirror image, of whose outputs the mean counts.
        views = [decoded.pixels]
        if mirror:
            views.append(np.ascontiguousarray(decoded.pixels[:, ::-1]))
        with translating_errors(loaded.runtime):
            outputs = [loaded.runtime.run(view[None])[name][0] for view in views]

        rows.append(np.mean(outputs, axis=0, dtype=np.float32))
        if not have_answers(rows[-1][None]).all():
            raise DataError(f"{path}: the network's output is not finite; verify the bundle")
        on_image()
    return np.stack(rows)
