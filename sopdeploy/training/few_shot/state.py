"""What the few-shot procedure fits, and `last.pt` of its run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sopdeploy.training.records.checkpoints import (
    Fit,
    Setup,
    check_parts,
    resume_of,
    run_record,
    state_errors,
)
from sopdeploy.training.records.results import read_result
from sopdeploy.weights.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotFit(Fit):
    """What the few-shot procedure has fitted to N training images of K classes.

    Attributes:
        logits: Out-of-fold logits (N, K) float64, with the energies of the exported network.
        groups: The group (N,) int64 of each image: copies of a photograph, and images that show one object.
        copies: The photograph (N,) int64 that each image shows.
        judged: Indices of the images that the score counts: one of the copies of a photograph.
        label_logits: Out-of-fold logits (N, K) that contradict wrong labels; None with several classes per
            image.
        left_out: The energies (N,) of the images by networks without their class; None with several classes
            per image.
    """

    logits: NDArray[np.float64]
    groups: NDArray[np.int64]
    copies: NDArray[np.int64]
    judged: NDArray[Any]
    label_logits: NDArray[np.float64] | None
    left_out: NDArray[np.float64] | None


def last_few_shot_record(setup: Setup, fit: FewShotFit) -> Checkpoint:
    """Build the content of `last.pt` of a few-shot run, which is finished."""
    arrays = {
        "out_of_fold": fit.logits,
        "groups": fit.groups,
        "judged": fit.judged,
        "copies": fit.copies,
        "targets": setup.data.train.targets,
        "file_hashes": fit.file_hashes,
    }
    if fit.seen is not None:
        arrays["seen"] = fit.seen
    if fit.left_out is not None:
        arrays["left_out"] = fit.left_out
    if fit.label_logits is not None:
        arrays["label_logits"] = fit.label_logits
    resume = resume_of(setup, fit.position, fit.network.state_dict())
    resume["procedure"] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return run_record(setup, fit, resume)


def read_few_shot_fit(setup: Setup, last: Checkpoint, source: Path) -> FewShotFit:
    """Read the fit of the finished few-shot run of *last*, whose network is that of *setup*.

    Raises `CheckpointError` if the record is missing or damaged.
    """
    check_parts(last, source, ())
    with state_errors(last, source):
        state: Any = last.resume  # None raises a TypeError
        arrays = state["procedure"]
        label_logits = arrays.get("label_logits")
        left_out = arrays.get("left_out")
        seen = arrays.get("seen")
        return FewShotFit(
            name=last.model,
            network=setup.model,
            position=setup.position,
            # Older runs may lack the hashes in the order of the images.
            file_hashes=arrays.get("file_hashes", last.image_hashes).numpy(),
            result=read_result(last.training),
            decision=last.decision,
            logits=arrays["out_of_fold"].double().numpy(),
            groups=arrays["groups"].numpy(),
            copies=_copies_of(arrays).numpy(),
            judged=arrays["judged"].numpy(),
            label_logits=None if label_logits is None else label_logits.double().numpy(),
            left_out=None if left_out is None else left_out.numpy(),
            seen=None if seen is None else seen.numpy(),
        )


def read_copies(last: Checkpoint) -> NDArray[np.int64] | None:
    """Read the photograph (N,) that each image of a few-shot run shows; None if *last* has none."""
    arrays = (last.resume or {}).get("procedure", {})
    return _copies_of(arrays).numpy() if "groups" in arrays else None


def _copies_of(arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the copies (N,) among the *arrays* of a few-shot run; older ones have only groups."""
    return arrays.get("copies", arrays["groups"])


def read_label_logits(last: Checkpoint) -> NDArray[np.float64] | None:
    """Read the logits (N, K) of a few-shot run that contradict wrong labels; None if *last* has none."""
    logits = (last.resume or {}).get("procedure", {}).get("label_logits")
    return None if logits is None else logits.double().numpy()
