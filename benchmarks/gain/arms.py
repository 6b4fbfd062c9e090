"""The arms of the experiment: networks of the catalog that read cached maps, and their closed form.

Letters: B images, N training images, D length of the vector, K classes.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gain.maps import ENTRY_TAP, LAST_CACHED, LATE_TAP, Part, Weights
from sopdeploy.models.base import Classifier
from sopdeploy.models.dsop import DSoP
from sopdeploy.models.registry import create_model
from sopdeploy.models.second_order_head import PooledHead, SecondOrderHead
from sopdeploy.training.few_shot.branches import fit_branches
from sopdeploy.training.few_shot.classifier import MAX_RANK, LinearProblem, Space
from sopdeploy.training.few_shot.features import PROJECTION_IMAGES, WIDTH
from sopdeploy.training.few_shot.scaling import Scaling
from sopdeploy.training.few_shot.targets import Targets

TAPS = (ENTRY_TAP, LATE_TAP)
BATCH = 32  # images
FOLDS = 10  # of the cross-validation that finds the temperature, as in `train`


class Arm(NamedTuple):
    """A network of the catalog with its options.

    `controls` names other arms, `times` multiplies the epochs. With `averages_experts`, there is no gate.
    """

    network: str
    config: Mapping[str, Any]
    controls: tuple[str, ...] = ()
    times: int = 1
    averages_experts: bool = False


class NoNoise(nn.Module):
    """In place of the gate's noise: nothing is added to the logits."""

    def forward(self, feature_BD: Tensor) -> Tensor:
        """Return 0."""
        return feature_BD.new_zeros(())


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
EVEN = "all 16 experts averaged (Ave-SOP-16) + averages"
DSOP, GSOP, GMSOP = (
    "DSoP: averages, branch detached",
    "GSoP blocks + default",
    "GM-SOP + averages",
)
ARMS: Mapping[str, Arm] = {
    AVERAGES: Arm(LITE, {"head": _head("gap")}),
    DEFAULT: Arm(LITE, {"head": _head("gap+isqrt")}, controls=(THREE_MAPS,)),
    DSOP: Arm("head:dsop-efficientnet-lite0", {"head": _head("gap")}, controls=(AVERAGES,)),
    THREE_MAPS: Arm(LITE, {"head": _head("gap+mean")}),
    ROOTS: Arm(LITE, {"head": _head("isqrt")}, controls=(THREE_MAPS,)),
    GSOP: Arm(
        "head:gsop-net1-efficientnet-lite0",
        {
            "head": _head("gap+isqrt"),
            "block_stages": ("blocks.4", "blocks.6"),
            "gate_bias": -2.0,
        },
        controls=(DEFAULT,),
    ),
    GMSOP: Arm(
        "gmsop-head:efficientnet-lite0",
        {"head": _head("gap+isqrt")},
        controls=(DEFAULT, EVEN),
    ),
    EVEN: Arm(
        "gmsop-head:efficientnet-lite0",
        {"head": {**_head("gap+isqrt"), "chosen": 16, "balance_weight": 0.0}},
        controls=(DEFAULT,),
        averages_experts=True,
    ),
    TWICE: Arm(LITE, {"head": _head("gap")}, times=2),
}


def build(arm: Arm, weights: Weights, num_classes: int, seed: int) -> SecondOrderHead:
    """Build the network of *arm* with the backbone's *weights*, whose early stages are identities.

    So it maps cached maps (B, 40, h, w) to logits. The random weights of new layers depend on *seed*.
    """
    torch.manual_seed(seed)
    network = cast(
        SecondOrderHead, create_model(arm.network, num_classes=num_classes, **arm.config)
    )
    fitting = {name: tensor for name, tensor in weights.items() if name in network.state_dict()}
    network.load_state_dict(fitting, strict=False)
    if arm.averages_experts:  # the weights of the gate are equal at first, and remain so
        gate = network.pooled_head.get_submodule("gate")
        gate.get_parameter("weight").requires_grad_(False)
        gate.add_module("noise", NoNoise())

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


@torch.no_grad()
def fit_projections(network: SecondOrderHead, train: Part, members: NDArray[np.int64]) -> None:
    """Fit the projections of the head of *network* to the maps of the first *members*."""
    head = network.pooled_head
    if not head.channels:
        return
    chosen = np.random.default_rng(0).permutation(members)[:PROJECTION_IMAGES]
    batches = []
    for start in range(0, len(chosen), BATCH):
        _, tapped = network.feature_maps(
            train.select(np.sort(chosen[start : start + BATCH])), head.channels
        )
        batches.append(dict(zip(head.channels, tapped, strict=True)))
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
    *,
    to_learn: bool = False,
) -> Fitted:
    """Fit the classifier of `train` to vectors whose *parts* are (N, D_i): a discriminant, and its temperature.

    With *to_learn*, it is shrunk until it does not interpolate, as the start of `fine_tune`.
    """
    order = np.random.default_rng(seed).permutation(len(targets))
    space = Space.of([part[order[:MAX_RANK]] for part in parts])
    vectors_ND = np.concatenate(parts, axis=1)
    classes = Targets(np.eye(num_classes)[targets], targets, activation="softmax")
    problem = LinearProblem(space, space.project(vectors_ND), vectors_ND, classes)
    folds = classes.folds([str(index) for index in range(len(targets))], FOLDS, seed)
    if to_learn:
        problem, scaling = problem.shrink_to_learn([folds])
    else:
        scaling = Scaling.fit([problem.cross_validate(folds)], classes)
    head = problem.fit_all(scaling)
    return Fitted(head.weight, head.bias)


@torch.no_grad()
def start_from_closed_form(
    network: SecondOrderHead, train: Part, members: NDArray[np.int64], seed: int
) -> None:
    """Set projections and classifiers of the head and the branches of *network* to closed forms on *members*."""
    fit_projections(network, train, members)
    targets = train.targets[members]
    head = network.pooled_head
    vectors = vectors_of(network, head, train, members)
    parts = [vectors[:, columns] for columns in columns_of(head)]
    fitted = fit_closed_form(parts, targets, network.num_classes, seed, to_learn=True)
    head.fc.weight.copy_(torch.from_numpy(fitted.weight))
    head.fc.bias.copy_(torch.from_numpy(fitted.bias))

    if isinstance(network, DSoP):
        # In random order: the batch norms of the branches see batches of all classes.
        order = np.random.default_rng(seed).permutation(members)

        def compute(module: nn.Module) -> NDArray[np.float32]:
            batches = np.array_split(order, math.ceil(len(order) / BATCH))
            return np.concatenate([module(train.select(batch)).numpy() for batch in batches])

        classes = np.eye(network.num_classes)[train.targets[order]]
        keys = [str(index) for index in range(len(order))]
        of_order = Targets(classes, train.targets[order], activation="softmax")
        fit_branches(network, compute, of_order, keys, seed)
