"""What a run takes over from networks that were trained before it: weights to start from, and a teacher."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic

from sopdeploy.frozen import Frozen, Positive


class StartChoice(Frozen):
    """Start from the checkpoint `weights`, tensor by tensor of the same name and shape.

    What the checkpoint lacks must be branches or the classifier. `learn = "branches"` leaves everything else
    as it was, batch norm's statistics included: the second of two phases. `head_factor` multiplies the
    learning rate of the classifier.
    """

    weights: Path | None = None
    learn: Literal["all", "branches"] = "all"
    head_factor: Positive = 1.0


class TeacherChoice(Frozen):
    """Learn the answers of the network in the checkpoint `weights` beside the classes.

    `share` of the loss of the main head is the divergence from the teacher's answers, both softened by
    `temperature` and scaled by its square. Source: Hinton et al., "Distilling the Knowledge in a Neural
    Network" (2015).
    """

    weights: Path | None = None
    share: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.5
    temperature: Positive = 1.0
