"""Test-time augmentation: several views of one image, whose predictions are averaged."""

import hashlib
from collections.abc import Callable
from typing import Literal

import numpy as np

from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import Pixels, Preprocess

TtaMode = Literal["none", "flip", "ten-crop", "pad-crop"]
TTA_PAD = 4  # pixels on each side


def check_tta_mode(mode: TtaMode, preprocess: Preprocess) -> None:
    """Raise `ConfigError` if *preprocess* leaves no corners for the test-time augmentation *mode*."""
    if mode == "ten-crop" and (preprocess.fit != "crop" or preprocess.crop == preprocess.resize):
        raise ConfigError(
            "the network sees the whole image, so there are no corners to crop",
            setting="tta",
            value=mode,
            remedies={"tta": "flip"},
        )


def tta_views(prepare: Callable[[Preprocess], Pixels], preprocess: Preprocess, mode: TtaMode) -> Pixels:
    """Compute the views of one image for test-time augmentation; returns (V, crop, crop, 3) uint8.

    *prepare* maps preprocessing rules to the preprocessed image. The first of several views is the plain
    center crop. "flip" adds its mirror image. "ten-crop" adds the four corners of the central square and
    mirrors all five (Krizhevsky et al., NIPS 2012, section 4.1). "pad-crop" is one view: a random crop after
    padding with 4 black pixels (GM-SOP, starred rows of Table 3). Its offset depends on the pixels only.
    """
    center = prepare(preprocess)
    if mode == "none":
        return center[None]
    if mode == "pad-crop":
        digest = hashlib.blake2b(center.tobytes(), digest_size=16).digest()
        top, left = (int.from_bytes(half, "big") % (2 * TTA_PAD + 1) for half in (digest[:8], digest[8:]))
        padded = np.pad(center, ((TTA_PAD, TTA_PAD), (TTA_PAD, TTA_PAD), (0, 0)))
        return padded[None, top : top + preprocess.crop, left : left + preprocess.crop]
    crops = [center]
    if mode == "ten-crop":
        side, crop = preprocess.resize, preprocess.crop
        square = prepare(preprocess.model_copy(update={"crop": side}))
        ends = (slice(0, crop), slice(side - crop, side))
        crops += [square[rows, columns] for rows in ends for columns in ends]
    return np.stack([*crops, *(view[:, ::-1] for view in crops)])
