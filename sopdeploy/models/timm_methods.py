"""The methods that timm's networks have, for the networks of the catalog."""

from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from sopdeploy.errors import ConfigError
from sopdeploy.models.backbones.base import Backbone


class TimmMethods(Backbone):
    """Mixin with the methods of timm's networks, for its training script, its optimizers and its tools.

    Attributes:
        pretrained_cfg: How timm describes the images of a network: their size, mean, interpolation and more.
            `sopdeploy.timm` sets it.
    """

    training_only: ClassVar[tuple[str, ...]]
    pretrained_cfg: dict[str, Any]

    def logits_layer(self) -> nn.Linear | None:
        """Find the linear layer whose outputs are the exported logits."""
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute the last feature map (B, C, h, w) of normalized images (B, 3, H, W)."""
        return self.feature_maps(images)[0]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute the logits (B, classes) of a last feature map; with *pre_logits*, what the classifier reads."""
        if not pre_logits:
            return self.classify(features)

        read: list[Tensor] = []
        classifier = self.get_classifier()
        with classifier.register_forward_pre_hook(lambda _, inputs: read.extend(inputs)):
            self.classify(features)
        return read[0]

    @cached_property
    def classifier_lengths(self) -> dict[str, int]:
        """The lengths of the vectors that the classifiers read, by name: of the network, then of its branches."""
        layer = self.logits_layer()
        if layer is None:
            raise ConfigError("the last layer of this network is not linear")
        return {
            name: module.in_features
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear)
            and (module is layer or name.endswith(".fc"))
            and module.out_features == self.num_classes
        }

    @property
    def classifier_name(self) -> str:
        """The name of the layer that computes the logits, which is in no part for training only."""
        branches = tuple(f"{part}." for part in self.training_only)
        return next(name for name in self.classifier_lengths if not name.startswith(branches))

    def get_classifier(self) -> nn.Module:
        """Return the linear layer that computes the logits, or the identity in its place."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and those of branches, by random ones; with 0 classes by identities.

        Raises `ConfigError` for a *global_pool*, because the pooling is an option of the network.
        """
        if global_pool:
            raise ConfigError(
                f"global_pool: cannot become {global_pool!r}; build the network with the option pooling"
            )
        device = next(self.parameters()).device
        for name, length in self.classifier_lengths.items():
            new = nn.Linear(length, num_classes) if num_classes else nn.Identity()
            self.set_submodule(name, new.to(device))
        self.num_classes = num_classes

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay beside biases and norms: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns by which timm orders parameters, for rates that fall from layer to layer.

        Groups are stages with *coarse*, and otherwise blocks. What matches none, such as classifiers
        and branches, is in the last group.
        """
        stem = "|".join(part.replace(".", r"\.") for part in self.stem_parts)
        stage = self.stage_names[0][:-1]  # without its number
        blocks = rf"^{stage}(\d+)".replace(".", r"\.")
        return {"stem": rf"^(?:{stem})\.", "blocks": blocks if coarse else rf"{blocks}\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let training compute the maps of blocks again in the backward pass, which saves memory."""
        self.grad_checkpointing = enable
