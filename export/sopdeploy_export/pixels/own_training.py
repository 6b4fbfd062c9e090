"""The pixels of a training by this package: what its loop gives a network in evaluation."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sopdeploy.data.photos.network_inputs import PreprocessedDataset
from sopdeploy.data.photos.photo import ImageFiles
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize, images_format
from sopdeploy_export.pixels.compare import TrainedPixels
from sopdeploy_export.pixels.transform import Transform

NAME = "the training"


def pixels_of_training(network: nn.Module, rules: Preprocess) -> TrainedPixels:
    """Return the pixels that a training of *network* with *rules* evaluates, by its data set and first layer."""
    normalize = Normalize(rules, images_format(network))

    def load(path: str) -> Tensor:
        file = Path(path)
        images = ImageFiles(
            root=file.parent,
            labels=("any",),
            paths=np.array([file.name.encode()]),
            targets=np.zeros(1, np.int64),
        )
        dataset = PreprocessedDataset(images=images, preprocess=rules)
        tensor: Tensor = normalize(torch.from_numpy(dataset.pixels([0])))
        return tensor[0]

    return TrainedPixels(Transform(load, NAME, takes="path"))
