"""What is measured and stored for a row: results of finished runs, mean errors over seeds, times of layers.

The slides on iSQRT-COV print times of second-order layers and of matrix functions. A layer reads maps of the
size of AlexNet's last one; a matrix function, the covariance of one such map.
"""

from collections.abc import Callable, Collection, Sequence
from statistics import mean
from typing import Any

import pydantic
import torch
from torch import Tensor

from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint
from sopdeploy.config import StrictModel
from sopdeploy.data.sources import open_data
from sopdeploy.evaluation.prediction import AllHeads, HeldOutMetrics, held_out_metrics, score_images
from sopdeploy.evaluation.statistics import student, wilson
from sopdeploy.layers.isqrt_cov import newton_schulz
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.models.base import Classifier
from sopdeploy.training.diagnostics import EpochRow, median_throughput
from sopdeploy.training.distributed import select_device
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.run import Position
from sopdeploy.training.train import TrainingResult, select_procedure

# Facts of tables that runs measure.
HOURS, SPEED, MILLISECONDS = "training, hours", "training, images per second", "inference, ms per image"
_CHANNELS, _SIDE, _IMAGES = 256, 13, 8  # of timed layers
_SECONDS = 0.1  # of a measurement, at least
_FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "eig": torch.linalg.eigh,
    "svd": torch.linalg.svd,
    "newton-schulz": lambda matrix: newton_schulz(matrix[None] / matrix.trace(), 5),
}


class SeedResult(StrictModel):
    """One finished run.

    `recipe` is the complete recipe and `network` the complete config of its network. `heads` holds the
    metrics of all heads if there are several. `usage` counts, for a gated network, the training images that
    each component received in the last epoch. `milliseconds` is the time of the deployed network per image,
    where the paper prints one.
    """

    seed: int
    recipe: dict[str, Any]
    network: dict[str, Any]
    history: tuple[EpochRow, ...]
    train_count: int
    held_out_count: int
    heads: dict[str, HeldOutMetrics]
    usage: tuple[int, ...]
    milliseconds: float | None = None
    machine: dict[str, Any]


class MeanError(StrictModel):
    """A mean over seeds with its 95 % interval: Student's t over seeds, Wilson's over images for one seed."""

    mean: float
    low: float
    high: float


def measure_run(recipe: Recipe, trained: TrainingResult, *, timed: bool) -> SeedResult:
    """Collect the results of a finished run for the table and the charts; *timed* adds the inference time."""
    checkpoint = read_checkpoint(trained.last)
    history = Position.model_validate((checkpoint.resume or {})["position"]).history
    model = build_classifier(checkpoint, trained.last)
    return SeedResult(
        seed=recipe.seed,
        recipe=recipe.model_dump(mode="json"),
        network=checkpoint.config,
        history=history,
        train_count=trained.train_count,
        held_out_count=trained.held_out_count,
        heads=_measure_heads(model, checkpoint, recipe),
        usage=history[-1].component_counts,
        milliseconds=_milliseconds_per_image(model, recipe) if timed else None,
        machine=checkpoint.training.get("machine", {}),
    )


def _measure_heads(model: Classifier, checkpoint: Checkpoint, recipe: Recipe) -> dict[str, HeldOutMetrics]:
    """Evaluate all heads of *model* on all held-out images; empty for a single head."""
    if len(model.loss_weights()) < 2:
        return {}
    images = select_procedure(recipe, open_data(recipe.data)).data.held_out
    network = AllHeads(model.to(select_device(recipe.device)))
    logits = network.split(score_images(network, checkpoint.preprocess, images, workers=recipe.workers))
    return {name: held_out_metrics((), logits_NC, images.targets) for name, logits_NC in logits.items()}


@torch.no_grad()
def _milliseconds_per_image(model: Classifier, recipe: Recipe) -> float:
    """Time the deployed network of *model* on batches of the recipe's size; the median, per image."""
    device, side = select_device(recipe.device), recipe.preprocess.crop
    network = model.inference_model().eval().to(device)
    images = torch.randn(recipe.batch_size, 3, side, side, device=device)
    return median_milliseconds(lambda: network(images)) / recipe.batch_size


def mean_error(runs: Sequence[SeedResult], name: str) -> MeanError | None:
    """Compute the mean error *name*, "top1" or "top5", of *runs* after the last epoch, in percent."""
    errors = [1 - getattr(run.history[-1].metrics, name) for run in runs]
    if not errors:
        return None
    center, count = mean(errors), runs[0].held_out_count
    low, high = student(errors) if len(errors) > 1 else wilson(round(center * count), count)
    return MeanError(mean=100 * center, low=100 * max(0.0, low), high=100 * min(1.0, high))


def measured_facts(
    runs: Sequence[SeedResult], baseline: Sequence[SeedResult], names: Collection[str]
) -> dict[str, float]:
    """Compute the facts *names* that runs measure: times, speed, and increments over the runs *baseline*."""
    facts = {
        HOURS: mean(run.history[-1].seconds for run in runs) / 3600,
        SPEED: mean(median_throughput(run.history) for run in runs),
    }
    times = [run.milliseconds for run in runs if run.milliseconds is not None]
    if times:
        facts[MILLISECONDS] = mean(times)
    for name, fact in {"top1": "top-1 increment", "top5": "top-5 increment"}.items():
        error, reference = mean_error(runs, name), mean_error(baseline, name)
        if error is not None and reference is not None:
            facts[fact] = reference.mean - error.mean
    return {name: facts[name] for name in names if name in facts}


def time_layer(layer: dict[str, Any], recipe: Recipe) -> dict[str, float]:
    """Time *layer* in milliseconds on the device and with the threads of *recipe*.

    *layer* holds the options of a pooling, timed per image, or the `kind` of a matrix function, timed per
    matrix. The result has forward and backward pass together (FP+BP), and the backward pass alone (BP).
    """
    device = select_device(recipe.device)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    torch.manual_seed(0)
    maps = torch.randn(_IMAGES, _CHANNELS, _SIDE, _SIDE).relu().to(device)
    call, count = _FUNCTIONS.get(layer["kind"]), 1
    values = maps[0].flatten(start_dim=1).cov()
    if call is None:
        pooling = pydantic.TypeAdapter(Pooling).validate_python(layer).build(_CHANNELS).to(device)
        call, count, values = pooling, _IMAGES, maps
    values.requires_grad_()
    stored = _flat(call(values))
    gradient = torch.randn_like(stored)

    def backward(output: Tensor) -> None:
        torch.autograd.grad(output, values, gradient, retain_graph=True)

    return {
        "FP+BP, ms": median_milliseconds(lambda: backward(_flat(call(values)))) / count,
        "BP, ms": median_milliseconds(lambda: backward(stored)) / count,
    }


def _flat(results: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Join the results of a layer or a matrix function, which may be several, in one vector."""
    tensors = (results,) if isinstance(results, Tensor) else results
    return torch.cat([tensor.flatten() for tensor in tensors])


def median_milliseconds(call: Callable[[], Any]) -> float:
    """Measure the median time of *call* in milliseconds, after a warm-up and with torch's threads."""
    from torch.utils.benchmark import Timer  # noqa: PLC0415 - may warn about CUDA's compiler

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return 1000 * float(timer.blocked_autorange(min_run_time=_SECONDS).median)
