"""The costs of a network: parameters and multiply-adds for one image, trained and exported."""

import torch
from torch import nn

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.config import StrictModel
from sopdeploy.models.registry import create_model
from sopdeploy.models.stats import Counts, tally


class NetworkSummary(StrictModel):
    """The costs of the network as it was trained, and of what is exported."""

    trained: Counts
    shipped: Counts


def summarize_checkpoint(checkpoint: Checkpoint) -> NetworkSummary:
    """Summarize the network of *checkpoint* at its input size, without allocating memory."""
    with torch.device("meta"):
        network = create_model(checkpoint.model, num_classes=len(checkpoint.labels), **checkpoint.config)
        plain = network.inference_model() if network.training_only else network
    return summarize(network, plain, checkpoint.preprocess.crop)


def summarize(network: nn.Module, shipped: nn.Module, side: int) -> NetworkSummary:
    """Count the costs of *network*, and of *shipped*, the network without its training-only parts.

    Both networks run on images of *side* x *side* pixels, on `meta` or the CPU, and may change between train
    and eval mode. If *network* fails in train mode, for example without targets, it runs in eval mode.
    """
    exported = tally(shipped.eval(), side).total()
    with torch.random.fork_rng(devices=()):  # dropout draws random numbers
        try:
            trained = tally(network.train(), side).total()
        except Exception:  # the network's own code, which can raise anything
            trained = tally(network.eval(), side).total()
    return NetworkSummary(trained=trained, shipped=exported)
