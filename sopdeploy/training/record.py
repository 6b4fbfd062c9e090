"""What `best.pt` and `last.pt` contain of every run, and `last.pt` of a few-shot run.

Only this module, `recorded`, which reads them, and `loop.state`, which adds the state of a loop, know the
keys below `training` and `resume`. Sample order, augmentation, dropout and learning rate are functions of
(seed, epoch, step). Weights, optimizer state and position are therefore enough to resume a run bit for bit.
"""

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.decision import Decision
from sopdeploy.environment import machine
from sopdeploy.errors import TrainingError
from sopdeploy.evaluation.multi_label import DEFAULT_THRESHOLD, MultiLabelMetrics
from sopdeploy.layers.normalize import images_format
from sopdeploy.plugins import plugin_versions
from sopdeploy.project import SAMPLED
from sopdeploy.training.fits import FewShotFit, Fit, Position
from sopdeploy.training.recorded import state_errors
from sopdeploy.training.results import AnyProcedureResult, read_result
from sopdeploy.training.start import Start
from sopdeploy.version import __version__


def best_record(start: Start, fit: Fit, resume: dict[str, Any] | None = None) -> Checkpoint:
    """Build the content of `best.pt`; raise `TrainingError` if a weight is a NaN or infinity.

    *resume* is what `last.pt` contains in addition.
    """
    weights = fit.network.state_dict()
    learning = {} if fit.learning is None else fit.learning.state_dict()
    checked = tree_leaves({"weights": weights, "learning": learning, "resume": resume})
    if not all(bool(value.isfinite().all()) for value in checked if isinstance(value, Tensor)):
        raise TrainingError(
            "weights or optimizer state are not finite; nothing was saved, lower optimizer.lr or set "
            "optimizer.clip_norm"
        )
    hashes = np.unique(fit.file_hashes)  # sorted
    origin = start.origin and start.origin.model_copy(update={"sample": tuple(hashes[:SAMPLED].tolist())})
    return Checkpoint(
        model=fit.name,
        config=fit.network.config.model_dump(mode="json"),
        weights=weights,
        labels=start.labels,
        preprocess=start.recipe.preprocess,
        training=_describe_training(start, fit),
        resume=resume,
        decision=fit.decision or _multi_label_decision(start, fit.position),
        image_hashes=torch.from_numpy(hashes),
        project=start.recipe.project or "",
        origin=origin,
    )


def _multi_label_decision(start: Start, position: Position) -> Decision | None:
    """Build the decision of a multi-label network, with the thresholds of the last finished epoch."""
    if start.activation == "softmax":
        return None
    metrics = position.history[-1].metrics if position.history else None
    fitted = metrics.thresholds if isinstance(metrics, MultiLabelMetrics) else None
    return Decision(activation="sigmoid", thresholds=fitted or (DEFAULT_THRESHOLD,) * len(start.labels))


def _describe_training(start: Start, fit: Fit) -> dict[str, Any]:
    """Describe how the weights were trained."""
    history, device = fit.position.history, start.strategy.device
    plugins = plugin_versions([*fit.network.modules(), start.recipe.data])
    return {
        "recipe": start.recipe.model_dump(mode="json"),
        "images_format": str(images_format(fit.network)).removeprefix("torch."),
        **({} if start.weights is None else {"start": start.weights.model_dump(mode="json")}),
        "seed": start.recipe.seed,
        "epoch": fit.position.epoch,
        "step": fit.position.step,
        "weights": "raw" if fit.learning is None else "average",
        "metrics": history[-1].metrics.model_dump() if history else None,
        **({} if fit.result is None else {"procedure": fit.result.model_dump(mode="json")}),
        "versions": {
            "sopdeploy": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        **({"plugins": plugins} if plugins else {}),
        "machine": {
            **{name: fact for name, fact in machine().items() if name != "load"},  # which other runs change
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": start.strategy.world,
        },
    }


def with_result(best: Checkpoint, result: AnyProcedureResult, decision: Decision | None) -> Checkpoint:
    """Add the result and the decision to the content of `best.pt` of a finished training loop."""
    training = {**best.training, "procedure": result.model_dump(mode="json")}
    return replace(best, training=training, decision=decision)


def resume_of(start: Start, position: Position, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return what `last.pt` contains of every run to resume it."""
    return {
        "position": position.model_dump(mode="json"),
        "train_count": len(start.data.train),
        "held_out": torch.from_numpy(start.held_out),
        "weights": weights,
        "procedure": {},
    }


def last_few_shot_record(start: Start, fit: FewShotFit) -> Checkpoint:
    """Build the content of `last.pt` of a few-shot run, which is finished."""
    arrays = {"out_of_fold": fit.logits, "groups": fit.groups, "judged": fit.judged}
    arrays["copies"] = fit.copies
    if fit.left_out is not None:
        arrays["left_out"] = fit.left_out
    if fit.label_logits is not None:
        labels = {"targets": start.data.train.targets, "file_hashes": fit.file_hashes}
        arrays |= {"label_logits": fit.label_logits, **labels}
    resume = resume_of(start, fit.position, fit.network.state_dict())
    resume["procedure"] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return best_record(start, fit, resume)


def read_few_shot_fit(start: Start, last: Checkpoint, source: Path) -> FewShotFit:
    """Read the fit of the finished few-shot run of *last*, whose network is that of *start*."""
    with state_errors(source):
        arrays: Any = (last.resume or {})["procedure"]
        label_logits, left_out = arrays.get("label_logits"), arrays.get("left_out")
        return FewShotFit(
            name=last.model,
            network=start.model,
            position=start.position,
            file_hashes=last.image_hashes.numpy(),
            result=read_result(last.training),
            decision=last.decision,
            logits=arrays["out_of_fold"].double().numpy(),
            groups=arrays["groups"].numpy(),
            copies=arrays.get("copies", arrays["groups"]).numpy(),  # older runs have no `copies`
            judged=arrays["judged"].numpy(),
            label_logits=None if label_logits is None else label_logits.double().numpy(),
            left_out=None if left_out is None else left_out.double().numpy(),
        )
