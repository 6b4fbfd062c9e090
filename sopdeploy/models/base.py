"""Base class of catalog networks: a backbone with training-only parts and an inference model."""

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from sopdeploy.errors import ConfigError, shorten
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.backbones.base import Backbone
from sopdeploy.models.joined_heads import JoinedHeads
from sopdeploy.models.timm_methods import TimmMethods


def is_in(name: str, *modules: str) -> bool:
    """Check whether *name* is the dotted name of one of *modules* or of a module or tensor in them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def last_linear(
    module: nn.Module, outputs: int, training_only: Sequence[str] = ()
) -> nn.Linear | None:
    """Find the last module with parameters in *module*, outside of *training_only*.

    None unless it is a linear layer with so many *outputs*.
    """
    # A norm without weights counts, too, because it changes logits: its `_parameters` are None.
    exported = [
        part
        for name, part in module.named_modules()
        if part._parameters and not is_in(name, *training_only)
    ]

    last = exported[-1] if exported else None
    return last if isinstance(last, nn.Linear) and last.out_features == outputs else None


class TrainingOutput(NamedTuple):
    """Output in train mode of a network with training-only parts.

    `logits` (B, classes) come from the part that is exported; `branches` maps each
    training-only head to its (B, classes) logits; `penalties` maps names to scalars that are
    added to the loss without a weight. `component_counts` (N,) counts the images that each of N
    components receives, if the network has a gate.
    """

    logits: Tensor
    branches: dict[str, Tensor]
    penalties: dict[str, Tensor]
    component_counts: Tensor | None = None


class Classifier(TimmMethods):
    """A network of the catalog.

    In eval mode `forward` returns (B, classes) logits and never uses the training-only parts.
    In train mode it returns a `TrainingOutput` if there are such parts, else the logits.

    Attributes:
        training_only: Dotted names of the parts that are removed before export.
        inference_class: Class of the inference model; `None` is this class, for networks that are exported
            with all parts.
        preprocess: The rules by which the weights that `sopdeploy.create_model` loaded see images.
        batches_per_step: Number of calls in train mode whose mean losses make one step. The training loop
            sets it to `grad_accum_steps`, for penalties that the number of images of a step divides.
        joins_heads: Whether calls in train mode return `JoinedHeads` in the place of a `TrainingOutput`, for
            training loops that expect logits.
    """

    training_only: ClassVar[tuple[str, ...]] = ()
    inference_class: ClassVar[type[Backbone] | None] = None
    preprocess: Preprocess | None = None
    batches_per_step: int = 1
    joins_heads: bool = False

    def __call__(self, *images: Any) -> Any:
        """Run `forward`; with `joins_heads`, a `TrainingOutput` becomes one tensor."""
        output = super().__call__(*images)
        if not (self.joins_heads and isinstance(output, TrainingOutput)):
            return output
        heads = {"main": output.logits, **output.branches}
        return JoinedHeads.of(heads, self.loss_weights(), [*output.penalties.values()])

    def inference_model(self) -> Backbone:
        """Build the network to export from the config, with fresh weights; shares no module with this one."""
        if self.training_only and self.inference_class is None:
            raise TypeError(
                f"{type(self).__name__} has training-only parts; set inference_class"
            )
        return (self.inference_class or type(self))(self.config, self.num_classes)

    def forward(self, images: Tensor) -> Any:
        """Compute (B, classes) logits, or with training-only heads in train mode a `TrainingOutput`."""
        if not (self.training and self.has_training_heads):
            return super().forward(images)
        branches = self.heads(images)
        logits = branches.pop("main")
        return TrainingOutput(logits, branches=branches, penalties={})

    @property
    def has_training_heads(self) -> bool:
        """Whether there are training-only heads; False once they are removed, as for the export."""
        return not self._modules.keys().isdisjoint(self.training_only)

    def heads(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the (B, classes) logits of every head: `main` and the training-only ones."""
        return {"main": self(images)}  # a network with training-only heads overrides this

    def without_branches(self) -> "Classifier":
        """Build the network without branches, or return this one if it has none; all other weights stay."""
        return self

    def loss_weights(self) -> dict[str, float]:
        """Return the weight of each head's loss: `main` and the names in `branches`."""
        return {"main": 1.0}

    def logits_layer(self) -> nn.Linear | None:
        """Find the linear layer whose outputs are the exported logits; `None` if there is none.

        It is the last module with parameters in the last of `classifier_parts`. If there is no
        such part, it is the last one of the network that is not training-only. It must have one
        output per class.
        """
        part = self._modules.get(self.classifier_parts[-1])
        if part is not None:
            return last_linear(part, self.num_classes)
        return last_linear(self, self.num_classes, self.training_only)

    def has_scalable_logits(self) -> bool:
        """Tell whether a temperature may divide the logits: a linear layer computes them."""
        return self.logits_layer() is not None

    def channels_of_maps(self, taps: Sequence[str] | None) -> dict[str, int]:
        """Return the number of channels of each feature map at *taps*, in the order of computation.

        With `None`, it is that of the last map only. Raises `ConfigError` for an unknown tap or a
        network without feature maps.
        """
        names = list(self.tap_channels)

        if not names:
            raise ConfigError("head.taps: this network has no feature maps; set head.kind=gap")

        chosen = names[-1:] if taps is None else taps
        for tap in chosen:
            if tap not in names:
                raise ConfigError(
                    f"head.taps: no feature map {tap!r}; choose from {shorten(names)}"
                )
        return {tap: self.tap_channels[tap] for tap in names if tap in chosen}

    def remove_classifier(self) -> int:
        """Replace the layer that computes the logits by the identity; return the length of its input.

        The network then returns this vector. Raises `ConfigError` if the last layer is not
        linear.
        """
        # Not `self.logits_layer`: that of a network with a head returns the layer of the head.
        layer = Classifier.logits_layer(self)
        if layer is None:
            raise ConfigError(
                "head: the last layer of this network is not linear; choose another network"
            )

        name = next(name for name, module in self.named_modules() if module is layer)
        self.set_submodule(name, nn.Identity())
        return layer.in_features


@cache
def as_classifier(network: type[Backbone]) -> type[Classifier]:
    """Return *network* itself if it is a `Classifier`, else a `Classifier` that is exported as *network*."""
    if issubclass(network, Classifier):
        return network
    parts = {"inference_class": network, "__doc__": network.__doc__}
    return type(f"Plain{network.__name__}", (Classifier, network), parts)
