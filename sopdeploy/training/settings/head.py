"""The settings of linear classifiers on features of a frozen network. Imports no torch."""

from typing import Annotated, Literal

import pydantic

from sopdeploy.base.config import StrictModel
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import CatalogModel

FittedKind = Literal["gap+isqrt", "gap"]


class FeatureSettings(StrictModel):
    """What the features of a frozen network, and a classifier on them, depend on; keys of the recipe itself.

    `seed` determines random numbers, `workers` is the maximum number of data loading processes.
    """

    seed: pydantic.NonNegativeInt = 0
    workers: pydantic.NonNegativeInt = 0
    channels_last: bool = False
    model: CatalogModel
    preprocess: Preprocess = Preprocess()


class HeadOptions(StrictModel):
    """Options of the procedures that fit a linear classifier to features of a frozen network.

    Attributes:
        folds: Largest number of folds of the cross-validation (`Targets.folds`).
        group_copies: Whether near-duplicates share a fold; exact duplicates and groups of the user always do.
        head: What the classifier reads: the network's own vector, and the matrix square roots of the covariances of
            its last two feature maps; or the vector alone.
        margins: Whether a class of fewer than five independent photographs must exceed the others by a margin. It
            then takes fewer of their images, and is found less often. `train --from` sets it.
    """

    folds: Annotated[int, pydantic.Field(ge=2, le=20)] = 10
    group_copies: bool = True
    head: FittedKind = "gap+isqrt"
    margins: bool = False


class FewShotConfig(HeadOptions):
    """Training for few images: a linear classifier on features of a frozen network."""

    kind: Literal["few_shot"] = "few_shot"


class FineTuneConfig(HeadOptions):
    """Training of the last stages from the fitted classifier, if that is better on held-out images.

    `FINE_TUNE_SETTINGS` replace the settings of the recipe in which a user selects this procedure.
    """

    kind: Literal["fine_tune"] = "fine_tune"
