"""Images of none of the classes, from a folder: their logits, for the threshold of unknown images."""

from pathlib import Path

from torch import nn

from sopdeploy.data.base import PreprocessedDataset
from sopdeploy.data.datasets.layouts import open_any_images
from sopdeploy.data.image_files import hash_images, unreadable_images_error
from sopdeploy.errors import DataError
from sopdeploy.evaluation.decision_fit import UnknownLogits
from sopdeploy.evaluation.prediction import predict_logits
from sopdeploy.images.preprocess import Preprocess


def predict_unknown(
    model: nn.Module, folder: Path | None, preprocess: Preprocess, *, batch_size: int, workers: int
) -> UnknownLogits | None:
    """Compute the logits of *model* on the images in *folder*, in two halves; None without a folder.

    The hash of its bytes says whether an image sets or tests the threshold, so copies are in the same half.
    Raises `DataError` if an image cannot be read.
    """
    if folder is None:
        return None
    images = open_any_images(folder)
    try:
        dataset = PreprocessedDataset(images, preprocess)
        logits, _ = predict_logits(model.eval(), dataset, preprocess, batch_size=batch_size, workers=workers)
    except DataError as error:
        raise unreadable_images_error(error, images) from None
    sets_N = hash_images(images) % 2 == 0
    return UnknownLogits(logits[sets_N], logits[~sets_N])
