"""Network inputs: labeled images converted to uint8 arrays of one size."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.photos.photo import LabeledImages, Target


@dataclass(frozen=True, slots=True)
class Dataset(ABC):
    """Base class of network inputs: the `images` of a source, converted to uint8 arrays of one size."""

    images: LabeledImages

    def __len__(self) -> int:
        return len(self.images)

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], Target]: ...


@dataclass(frozen=True, slots=True)
class PreprocessedDataset(Dataset):
    """Images preprocessed exactly as the service does, for evaluation.

    With `pad`, they are padded with that many black pixels and cropped at an offset that the pixels decide.
    """

    preprocess: Preprocess
    pad: int = 0

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], Target]:
        image, target = self.images[index]
        array, pad = preprocess_image(image, self.preprocess), self.pad
        if pad:  # the offset is the same in every epoch
            digest = hashlib.blake2b(array.tobytes(), digest_size=16).digest()
            top, left = (int.from_bytes(half, "big") % (2 * pad + 1) for half in (digest[:8], digest[8:]))
            padded = np.pad(array, ((pad, pad), (pad, pad), (0, 0)))
            array = padded[top : top + self.preprocess.crop, left : left + self.preprocess.crop]
        return array, target
