"""The arms of the experiment: networks of the catalog that read cached maps, and their closed form.

Letters: B images, N training images, D length of the vector, K classes.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gain.maps import ENTRY_TAP, LAST_CACHED, LATE_TAP, Part, Weights
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import create_model
from sopdeploy.models.second_order_head import PooledHead, SecondOrderHead
from sopdeploy.training.few_shot.classifier import MAX_RANK, LinearProblem, Space
from sopdeploy.training.few_shot.features import PROJECTION_IMAGES, WIDTH
from sopdeploy.training.few_shot.scaling import Scaling
from sopdeploy.training.few_shot.targets import Targets

TAPS = (ENTRY_TAP, LATE_TAP)
BATCH = 32  # images
FOLDS = 10  # of the cross-validation that finds the temperature, as in `train`


class Arm(NamedTuple):
    """A network of the catalog with its options; `times` multiplies the epochs, `control` names another arm."""

    network: str
    config: Mapping[str, Any]
    control: str = ""
    times: int = 1


def _head(kind: str) -> dict[str, Any]:
    """Configure a head of *kind* on the maps of the default classifier."""
    taps = None if kind == "gap" else TAPS
    return {"kind": kind, "taps": taps, "width": WIDTH}


LITE = "head:efficientnet-lite0"
AVERAGES, THREE_MAPS, DEFAULT = (
    "averages",
    "averages of three maps",
    "averages + roots (default)",
)
ROOTS, TWICE = "roots alone", "averages, twice the epochs"
DSOP, GSOP, GMSOP = (
    "DSoP: averages, branch detached",
    "GSoP blocks + default",
    "GM-SOP + averages",
)
ARMS: Mapping[str, Arm] = {
    AVERAGES: Arm(LITE, {"head": _head("gap")}),
    DEFAULT: Arm(LITE, {"head": _head("gap+isqrt")}, control=THREE_MAPS),
    DSOP: Arm(
        "dsop-head:efficientnet-lite0",
        {"head": _head("gap"), "branch": _head("gap+isqrt")},
    ),
    THREE_MAPS: Arm(LITE, {"head": _head("gap+mean")}),
    ROOTS: Arm(LITE, {"head": _head("isqrt")}, control=THREE_MAPS),
    GSOP: Arm(
        "head:gsop-net1-efficientnet-lite0",
        {
            "head": _head("gap+isqrt"),
            "block_stages": (LAST_CACHED, "blocks.6"),
            "gate_bias": -4.0,
        },
        control=DEFAULT,
    ),
    GMSOP: Arm("gmsop-head:efficientnet-lite0", {"head": _head("gap+isqrt")}, control=DEFAULT),
    TWICE: Arm(LITE, {"head": _head("gap")}, times=2),
}


def build(arm: Arm, weights: Weights, num_classes: int, seed: int) -> SecondOrderHead:
    """Build the network of *arm* with the backbone's *weights*, whose early stages are identities.

    So it maps cached maps (B, 112, h, w) to logits. The random weights of new layers depend on *seed*.
    """
    torch.manual_seed(seed)
    network = cast(
        SecondOrderHead, create_model(arm.network, num_classes=num_classes, **arm.config)
    )
    fitting = {name: tensor for name, tensor in weights.items() if name in network.state_dict()}
    network.load_state_dict(fitting, strict=False)

    # The cached maps are what the stages up to `LAST_CACHED` compute.
    for part in network.stem_parts:
        network.set_submodule(part, nn.Identity())
    for stage in network.stage_names:
        blocks = network.get_submodule(stage)
        is_last = stage == LAST_CACHED
        for name, _ in list(blocks.named_children()):
            if name.isdigit():
                blocks.set_submodule(name, nn.Identity())
        if is_last:
            break
    return network.to(memory_format=torch.channels_last).eval()


def heads_of(network: SecondOrderHead) -> list[PooledHead]:
    """List the head of *network*, and its branch if it has one."""
    return [head for head in network.children() if isinstance(head, PooledHead)]


@torch.no_grad()
def fit_projections(network: SecondOrderHead, train: Part, members: NDArray[np.int64]) -> None:
    """Fit the projections of all heads of *network* to the maps of the first *members*."""
    chosen = np.random.default_rng(0).permutation(members)[:PROJECTION_IMAGES]
    taps = {tap: 0 for head in heads_of(network) for tap in head.channels}
    batches = []
    for start in range(0, len(chosen), BATCH):
        _, tapped = network.feature_maps(
            train.select(np.sort(chosen[start : start + BATCH])), taps
        )
        batches.append(dict(zip(taps, tapped, strict=True)))

    for head in heads_of(network):
        if head.channels:
            head.fit_projection(batches)


@torch.no_grad()
def vectors_of(
    network: SecondOrderHead, head: PooledHead, part: Part, members: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Compute the vectors (N, D) that *head* reads of the images *members* of *part*."""
    rows = []
    for start in range(0, len(members), BATCH):
        last, tapped = network.feature_maps(
            part.select(members[start : start + BATCH]), head.channels
        )
        own = Classifier.classify(network, last)  # the identity has replaced the classifier
        rows.append(head.vector(own, dict(zip(head.channels, tapped, strict=True))).numpy())
    return np.concatenate(rows)


def columns_of(head: PooledHead) -> list[slice]:
    """Find the columns of each kind of statistics of each map in the vector of *head*."""
    lengths = {
        "gap": [head.own_length],
        "mean": list(head.channels.values()),
        "isqrt": [
            int(head.pooling(tap).out_features) for tap in head.channels if head.poolings
        ],
    }
    in_order = [length for part in head.config.parts for length in lengths[part]]
    return [slice(*pair) for pair in pairwise(accumulate(in_order, initial=0))]


class Fitted(NamedTuple):
    """A linear classifier of vectors (N, D): `weight` (K, D) and `bias` (K,)."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]

    def predict(self, vectors: NDArray[np.floating]) -> NDArray[np.int64]:
        """Predict the classes (n,) of *vectors* (n, D)."""
        return (vectors @ self.weight.T + self.bias).argmax(axis=1)


def fit_closed_form(
    parts: Sequence[NDArray[np.float32]],
    targets: NDArray[np.int64],
    num_classes: int,
    seed: int,
) -> Fitted:
    """Fit the classifier of `train` to vectors whose *parts* are (N, D_i): a discriminant, and its temperature."""
    order = np.random.default_rng(seed).permutation(len(targets))
    space = Space.of([part[order[:MAX_RANK]] for part in parts])
    vectors_ND = np.concatenate(parts, axis=1)
    classes = Targets(np.eye(num_classes)[targets], targets, activation="softmax")
    problem = LinearProblem(space, space.project(vectors_ND), vectors_ND, classes)
    folds = classes.folds([str(index) for index in range(len(targets))], FOLDS, seed)
    scaling = Scaling.fit([problem.cross_validate(folds)], classes)
    head = problem.fit_all(scaling)
    return Fitted(head.weight, head.bias)


@torch.no_grad()
def start_from_closed_form(
    network: SecondOrderHead, train: Part, members: NDArray[np.int64], seed: int
) -> None:
    """Set projections and classifiers of all heads of *network* to their closed form on *members*."""
    fit_projections(network, train, members)
    for head in heads_of(network):
        vectors = vectors_of(network, head, train, members)
        parts = [vectors[:, columns] for columns in columns_of(head)]
        fitted = fit_closed_form(parts, train.targets[members], network.num_classes, seed)
        head.fc.weight.copy_(torch.from_numpy(fitted.weight))
        head.fc.bias.copy_(torch.from_numpy(fitted.bias))
