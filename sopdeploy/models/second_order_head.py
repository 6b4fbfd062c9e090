"""Networks with a head on first-order and second-order statistics: `head:NAME` for every network NAME.

`dsop-head:NAME` has a head on averages, and this head as an auxiliary branch, which is detached: DSoP on a
network whose second-order head is known from a closed form. `gated_head` has `gmsop-head:NAME`.

The head replaces the classifier. Its input are, one after the other:

- `gap`: the vector that the network's own classifier reads, such as the average of the last feature map, or
  the class token of a transformer,
- `mean`: the averages of the feature maps at the taps, such as the mean of a transformer's patch tokens,
- `isqrt`: the square roots of the covariances of these maps (iSQRT-COV) after a projection to few channels.

One linear layer computes the logits. The tensors of the network keep their names, so its weight
files fit; those of the head are under `pooled_head`.

Letters: B images, C channels, H height, W width, d channels after the projection, D length of
the vector, K classes.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, Literal, cast

import pydantic
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax

from sopdeploy.base.config import Count, NonNegative
from sopdeploy.errors import ConfigError, DataError, first_line
from sopdeploy.layers.covariance import at_least_float32
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy.layers.isqrt_cov import Iterations, NewtonSchulzOptions
from sopdeploy.layers.pooling.covariance import ISqrtPooling, ISqrtPoolingConfig
from sopdeploy.models.base import Classifier, as_classifier, is_in
from sopdeploy.models.registry import Entry, entry

POOLED_HEAD = "pooled_head"
_SMALLEST_SQUARE = 1e-12  # of a length, whose gradient would otherwise be infinite at 0
HeadKind = Literal["gap", "isqrt", "gap+isqrt", "gap+mean", "gap+mean+isqrt"]


class HeadConfig(NewtonSchulzOptions):
    """The head of `head:NAME`; `kind` names its statistics, joined by "+".

    `taps` are the feature maps: stages or blocks of a network of the catalog or of timm,
    modules of a network of the user; by default the last one. `width` is d; a map of fewer
    channels is not projected. The root is that of the covariance divided by its norm `prenorm`.
    With `cosine`, the energy of the logits is the cosine between the network's own vector and
    the nearest class mean; `distance` was its predecessor.
    """

    kind: HeadKind = "gap+isqrt"
    taps: tuple[str, ...] | None = pydantic.Field(default=None, min_length=1)
    width: Count = 48
    iterations: Iterations = 7
    distance: bool = False
    cosine: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The statistics in the order of the vector."""
        return tuple(self.kind.split("+"))


class PooledHead(nn.Module, ExportHints):
    """Map the network's own vector (B, D_0) and feature maps (B, C, H, W) by tap to (B, classes) logits.

    Attributes:
        poolings: One `ISqrtPooling` per tap, by the name of the tap with "_" for "."; empty without `isqrt`.
        center, scale: With `distance`, the vector x is followed by the norm of (x - center) * scale. An equal
            negative weight of it in all logits lowers the energy of images that are unlike the training
            images, and does not change the probabilities.
        means: With `cosine`, the mean of each class of the network's own vectors, (K, D_0), of length 1.
        fc: The linear classifier of the vector.
    """

    keep_float32 = True
    center: Tensor
    scale: Tensor
    means: Tensor

    def __init__(
        self, config: HeadConfig, own_length: int, channels: Mapping[str, int], num_classes: int
    ) -> None:
        super().__init__()
        self.config = config
        self.channels = dict(channels)
        self.own_length = own_length

        # The second-order poolings, and how long each kind of statistics is.
        lengths = {"gap": own_length, "mean": sum(channels.values()), "isqrt": 0}
        self.poolings = nn.ModuleDict()
        if "isqrt" in config.parts:
            for tap, count in channels.items():
                pooling = self.build_pooling(count)
                self.poolings[tap.replace(".", "_")] = pooling
                lengths["isqrt"] += pooling.out_features

        # Statistics of the training images, with which the distance and the cosine are
        # computed; who fits the head sets them.
        length = sum(lengths[part] for part in config.parts)
        if config.distance:
            self.register_buffer("center", torch.zeros(length))
            self.register_buffer("scale", torch.ones(length))
            length += 1  # the distance
        if config.cosine:
            self.register_buffer("means", torch.zeros(num_classes, own_length))

        self.fc = nn.Linear(length, num_classes)

    def build_pooling(self, channels: int) -> Any:
        """Build the covariance pooling of a map of *channels*."""
        isqrt = ISqrtPoolingConfig(
            width=self.config.width,
            iterations=self.config.iterations,
            prenorm=self.config.prenorm,
            compensation="none",
            reduction="linear",
        )
        return isqrt.build(channels)

    def pool(self, maps: Mapping[str, Tensor]) -> list[Tensor]:
        """Compute the vector (B, d (d + 1) / 2) of the covariance of each map."""
        return [self.pooling(tap)(maps[tap]) for tap in self.channels]

    def vector(self, own_BD: Tensor, maps: Mapping[str, Tensor], *routing: Tensor) -> Tensor:
        """Concatenate the statistics to (B, D), float32 or float64; a head with a gate also takes its weights."""
        statistics: list[Tensor] = []
        for part in self.config.parts:
            if part == "gap":
                statistics.append(at_least_float32(own_BD))
            elif part == "mean":
                statistics += [
                    at_least_float32(maps[tap]).mean(dim=(2, 3)) for tap in self.channels
                ]
            else:
                statistics += self.pool(maps, *routing)

        vector_BD = torch.cat(statistics, dim=1) if len(statistics) > 1 else statistics[0]
        if not self.config.distance:
            return vector_BD

        # The distance to the center is one more number of the vector.
        square_B1 = ((vector_BD - self.center) * self.scale).square().sum(dim=1, keepdim=True)
        return torch.cat([vector_BD, square_B1.clamp_min(_SMALLEST_SQUARE).sqrt()], dim=1)

    def columns(self) -> list[slice]:
        """Find the columns of a `gap+isqrt` vector: those of the own vector, and of the root of each tap."""
        lengths = [self.own_length, *(self.pooling(tap).out_features for tap in self.channels)]
        return [slice(start, end) for start, end in pairwise(accumulate(lengths, initial=0))]

    def pooling(self, tap: str) -> ISqrtPooling:
        """Return the covariance pooling of *tap*."""
        return cast(ISqrtPooling, self.poolings[tap.replace(".", "_")])

    def forward(self, own_BD: Tensor, maps: Mapping[str, Tensor], *routing: Tensor) -> Tensor:
        """Compute the (B, classes) logits.

        With `cosine`, the largest cosine to a class mean is added to log-probabilities, so that
        the log-sum-exp of the logits is this cosine.
        """
        logits_BK: Tensor = self.fc(self.vector(own_BD, maps, *routing))
        if not self.config.cosine:
            return logits_BK

        own_BD = at_least_float32(own_BD)
        length_B1 = own_BD.square().sum(dim=1, keepdim=True).clamp_min(_SMALLEST_SQUARE).sqrt()

        # The cosine of the vectors with the class means, which have length 1.
        cosine_B1 = linear(own_BD, self.means).amax(dim=1, keepdim=True) / length_B1
        return log_softmax(logits_BK, dim=1) + cosine_B1

    @torch.no_grad()
    def fit_projection(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Set the projection of every tap to the principal components of its maps.

        *batches* have maps (B, C, H, W) by tap, as `head_inputs` returns them. A tap with at
        most `width` channels has no projection. Raises `DataError` if the maps have NaN or
        infinite values.
        """
        for tap, channels in self.channels.items():
            if "isqrt" in self.config.parts and channels > self.config.width:
                components_dC = principal_components(
                    [maps[tap] for maps in batches], self.config.width
                )
                self.set_projection(tap, components_dC)

    def set_projection(self, tap: str, projection_dC: Tensor) -> None:
        """Set the projection of the map at *tap*."""
        convolution: Any = self.pooling(tap).layer_reduce
        convolution.weight.copy_(projection_dC[:, :, None, None])


class SecondOrderHead(Classifier):
    """Mixin that replaces the classifier of a network by a `PooledHead`; put it before the network's class.

    Attributes:
        maps: Channels of the feature maps that the head reads, by tap.
    """

    inference_class = None
    head_class: type[PooledHead] = PooledHead

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__(config, num_classes)

        head: HeadConfig = config.head
        self.maps: dict[str, int] = {}
        if head.parts != ("gap",):  # which reads no maps
            self.maps = self.channels_of_maps(head.taps)

        own_length = self.remove_classifier()
        self.pooled_head = self.head_class(head, own_length, self.maps, num_classes)

    def start_from(self, fitted: "SecondOrderHead", others: Mapping[str, Tensor]) -> None:
        """Load the weights of *fitted*, a network with the same head, and *others* of parts that it lacks."""
        self.load_state_dict({**others, **fitted.state_dict()})

    def copy_with_head(self, head: HeadConfig) -> "SecondOrderHead":
        """Copy the network with another *head*, of random weights, on some of the maps of this one.

        The taps of *head* name these maps; without taps, it must read none. Raises `ConfigError`
        if an attribute of the network cannot be copied, such as a lock.
        """
        try:
            network = copy.deepcopy(self)
        except (TypeError, RuntimeError) as error:
            reason = f"the network cannot be copied ({first_line(error)})"
            raise ConfigError(f"{reason}; create what cannot be copied in `forward`") from error

        network.config = self.config.model_copy(update={"head": head})
        network.maps = {tap: self.maps[tap] for tap in head.taps or ()}
        own_length = self.pooled_head.own_length
        network.pooled_head = PooledHead(head, own_length, network.maps, self.num_classes)

        device = next(self.parameters()).device
        return network.to(device, memory_format=torch.contiguous_format).train(self.training)  # type: ignore[call-overload]

    @property
    def num_features(self) -> int:
        """The length D of the vector."""
        return self.pooled_head.fc.in_features

    def logits_layer(self) -> nn.Linear:
        """Return the linear layer of the head."""
        return self.pooled_head.fc

    def has_scalable_logits(self) -> bool:
        """Tell whether a temperature may divide the logits; it would divide the cosine, too."""
        return not self.pooled_head.config.cosine

    def heads(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the logits of every head in one run: of the branches of DSoP, and of this head, `main`."""
        if not self.has_training_heads:
            return {"main": self.pooled_head(*self.head_inputs(images))}

        # Each branch of `DSoP` reads the map at its tap, this head its own maps.
        network = cast(Any, self)
        branches: dict[str, str] = network.taps  # names of branches by tap
        last, maps = network.maps_at(images, {*branches, *self.maps})
        logits = {name: network.branches[name](maps[tap]) for tap, name in branches.items()}

        own_maps = {tap: maps[tap] for tap in self.maps}
        own_vector = super().classify(last)  # the identity has replaced its classifier
        return {**logits, "main": self.pooled_head(own_vector, own_maps)}

    def head_inputs(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute what the head reads: the network's own vector (B, D_0), and maps (B, C, H, W) by tap."""
        last, tapped = self.feature_maps(images, self.maps)
        return super().classify(last), dict(zip(self.maps, tapped, strict=True))

    def forward(self, images: Tensor) -> Any:
        """Compute (B, classes) logits, or with branches in train mode a `TrainingOutput`."""
        if self.training and self.has_training_heads:
            return super().forward(images)
        return self.pooled_head(*self.head_inputs(images))


class DetachableHead(SecondOrderHead):
    """Mixin that adds an auxiliary head, `config.branch`, to a network whose own head is `config.head`.

    Both heads read the maps of one run of the network. The exported network has no auxiliary head.
    """

    training_only = ("branch",)

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__(config, num_classes)
        head: HeadConfig = config.branch
        self.branch_maps = self.channels_of_maps(head.taps)
        self.branch = PooledHead(
            head, self.pooled_head.own_length, self.branch_maps, num_classes
        )

    def heads(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the logits of both heads in one run: `branch` and `main`."""
        if not self.has_training_heads:
            return super().heads(images)

        taps = [tap for tap in self.tap_channels if tap in self.branch_maps or tap in self.maps]
        last, tapped = self.feature_maps(images, taps)
        own = Classifier.classify(self, last)  # the identity has replaced the classifier
        maps = dict(zip(taps, tapped, strict=True))
        return {
            "branch": self.branch(own, {tap: maps[tap] for tap in self.branch_maps}),
            "main": self.pooled_head(own, {tap: maps[tap] for tap in self.maps}),
        }

    def loss_weights(self) -> dict[str, float]:
        """Return the weights of the losses of both heads."""
        config: Any = self.config
        return {"main": 1.0, "branch": config.branch_weight}


def head_entry(prefix: str, name: str) -> Entry:
    """Build the entry of `head:NAME` or `dsop-head:NAME` for the network *name*: its options, and `head`.

    Of another *prefix*, this is the entry of `head:NAME`, and errors name the prefix.
    Of `head:dsop-NAME`, the branches remain, and are detached before export. Raises `ConfigError`
    for a network with a head or other training-only parts.
    """
    base = entry(name)
    if issubclass(base.network, SecondOrderHead):
        raise ConfigError(f"{prefix}:{name}: {name} already has this head; omit one `head:`")
    keeps_branches = prefix == "head" and name.startswith("dsop-")
    if base.network.training_only and not keeps_branches:
        raise ConfigError(
            f"{prefix}:{name}: {name} has training-only parts; use a network without them"
        )

    classes: Any = base.network, base.config  # mypy takes their type for one without a hash
    network, config = _derive_head_classes(*classes)
    summary = f"{base.summary}, first-order and second-order head"
    if prefix == "dsop-head":
        network, config = _derive_detachable_classes(network, config)
        summary = f"{base.summary}, with a second-order head that is detached before export"
    return replace(base, network_source=network, config_source=config, summary=summary)


@cache
def _derive_head_classes(network: Any, config: Any) -> tuple[Any, Any]:
    """Derive the classes of *network* with a head and of its *config*, once for all lookups."""
    with_option = pydantic.create_model(
        f"Head{config.__name__}", __base__=config, head=(HeadConfig, HeadConfig())
    )

    parts = {}
    if network.training_only:
        plain: Any = as_classifier(network.inference_class)
        parts["inference_class"], _ = _derive_head_classes(plain, config)

    return type(f"Head{network.__name__}", (SecondOrderHead, network), parts), with_option


@cache
def _derive_detachable_classes(network: Any, config: Any) -> tuple[Any, Any]:
    """Derive the classes of *network*, which has a head, with a branch that is another one, and of its config.

    `branch` configures the auxiliary head, and `branch_weight` is the weight of its loss (beta).
    """
    options: Any = {
        "head": (HeadConfig, HeadConfig(kind="gap")),
        "branch": (HeadConfig, HeadConfig()),
        "branch_weight": (NonNegative, 1.0),
    }
    with_branch = pydantic.create_model(f"DSoP{config.__name__}", __base__=config, **options)
    parts = {"inference_class": network}
    return type(f"DSoP{network.__name__}", (DetachableHead, network), parts), with_branch


def without_head(name: str) -> str:
    """Return NAME of `head:NAME`, `dsop-head:NAME` and `gmsop-head:NAME`, and other names as they are."""
    return (
        name.removeprefix("dsop-").removeprefix("gmsop-").removeprefix("head:")
        if "head:" in name
        else name
    )


def head_name(name: str) -> str:
    """Return the name of the network *name*, without the branches of `dsop-NAME`, with a head."""
    return f"head:{without_head(name).removeprefix('dsop-')}"


def tuned_name(name: str) -> str:
    """Return the name of the network *name*, with its branches if it has any, with a head."""
    keeps_name = name.startswith(("dsop-head:", "gmsop-head:"))
    return name if keeps_name else f"head:{without_head(name)}"


def with_head(name: str, model: Classifier, head: HeadConfig) -> SecondOrderHead:
    """Build `head:NAME` with *head* for *model*, the network *name* of the catalog with any weights.

    The result is a new network on the same device and in the same mode. It has copies of the
    tensors of *model*, without its classifier and its training-only parts. The weights of the
    head are random. Raises `ConfigError` if the network cannot have this head.
    """
    with_head_entry = entry(head_name(name))
    # Options that `head:NAME` lacks are left out: they are of the training-only parts, such as
    # DSoP's.
    fields = with_head_entry.config.model_fields
    options = {key: value for key, value in model.config.model_dump().items() if key in fields}
    options["head"] = head.model_dump()

    # Tensors of both networks have the same names and values, but for those of the head.
    network = cast(SecondOrderHead, with_head_entry.build(model.num_classes, **options))
    state = network.state_dict()
    for tensor_name, tensor in model.state_dict().items():
        if tensor_name in state and not is_in(tensor_name, POOLED_HEAD):
            state[tensor_name] = tensor
    network.load_state_dict(state)

    device = next(model.parameters()).device
    return network.to(device).train(model.training)


@torch.no_grad()
def principal_components(batches: Sequence[Tensor], width: int) -> Tensor:
    """Compute the first *width* principal components (d, C) float64 of the positions of maps (B, C, H, W).

    They are the eigenvectors of the covariance (C, C) over all positions of *batches*, which
    are of any floating-point type and device. The largest eigenvalue is first. Each component
    has length 1, and its element of largest absolute value is positive, so that the result does
    not depend on the library. Raises `DataError` if the values of the maps are not finite.
    """

    def rows_of(maps_BCHW: Tensor) -> Tensor:  # (positions, C)
        return maps_BCHW.transpose(0, 1).flatten(start_dim=1).T.double().cpu()

    # The covariance over all positions, in two passes.
    positions = sum(maps.numel() // maps.shape[1] for maps in batches)

    mean_C = torch.stack([rows_of(maps).sum(dim=0) for maps in batches]).sum(dim=0) / positions
    covariance_CC = torch.zeros(len(mean_C), len(mean_C), dtype=torch.float64, device="cpu")
    for maps in batches:
        centered = rows_of(maps) - mean_C
        covariance_CC += centered.T @ centered / positions
    if not bool(torch.isfinite(covariance_CC).all()):
        raise DataError(
            "principal components: the feature maps have values that are not finite"
        )

    # The directions of the largest eigenvalues; a sign that does not depend on the library.
    _, vectors_CC = torch.linalg.eigh(covariance_CC)
    components_dC = vectors_CC.flip(1)[:, :width].T  # `eigh` puts the largest eigenvalue last

    # The element of each component whose sign becomes positive.
    largest_d1 = components_dC.abs().argmax(dim=1, keepdim=True)
    return components_dC * components_dC.gather(1, largest_d1).sign()
