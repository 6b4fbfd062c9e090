"""Networks that are compared: the network of the recipe with other heads, or with a GSoP block.

The dimension reduction of an iSQRT-COV head has no pretrained weights. It is set to the principal components
of the feature maps of training images, without their targets. Its bias makes all values positive, so that the
ReLU after it changes nothing; the covariance does not depend on this bias.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sopdeploy.backbones.resnet import ResNet
from sopdeploy.data.base import derive_seed
from sopdeploy.errors import ConfigError
from sopdeploy.layers.attention.gsop_block import GSoPBlock
from sopdeploy.layers.export_hints import export_hints
from sopdeploy.layers.pooling.base import ReducedPooling
from sopdeploy.layers.pooling.covariance import EigenPooling, ISqrtPooling, ISqrtPoolingConfig
from sopdeploy.models.base import Classifier, is_in
from sopdeploy.models.registry import CATALOG, create_model, make_config
from sopdeploy.training.few_shot.config import FewShotConfig
from sopdeploy.training.fine_tuning import classifier_name
from sopdeploy.training.recipe import Recipe

HEAD_WIDTH = 64  # channels of the iSQRT-COV head: 2080 features
NEUTRAL_SCALE = 1.5  # a block whose weights are all sigmoid(0) computes x + x / 2


class HeadNetwork(NamedTuple):
    """A network with one of the heads to compare; `name` describes the head."""

    name: str
    network: Classifier


def head_networks(recipe: Recipe, model: Classifier, config: FewShotConfig) -> list[HeadNetwork]:
    """Build one network per pooling to compare; all other weights are those of *model*.

    Without `few_shot.heads`, these are *model* itself and, if its average pooling can be replaced, a copy
    with iSQRT-COV. Raises `ConfigError` if a pooling of the recipe cannot be set or exported.
    """
    own = getattr(getattr(model.config, "pooling", None), "kind", "own")
    if config.heads:
        return [_with_pooling(recipe, model, pooling) for pooling in config.heads]
    networks = [HeadNetwork(own, model)]
    if own == "gap":
        with suppress(ConfigError):  # the pooling of this network is fixed
            networks.append(_with_pooling(recipe, model, ISqrtPoolingConfig(width=HEAD_WIDTH)))
    return networks


def _with_pooling(recipe: Recipe, model: Classifier, pooling: Any) -> HeadNetwork:
    """Build the network of *recipe* with *pooling*; all other weights are those of *model*."""
    values = {**recipe.model.config, "pooling": pooling.model_dump()}
    try:
        make_config(recipe.model.name, values)
    except ConfigError as error:
        raise ConfigError(f"few_shot.heads: {error}; leave heads empty") from error
    torch.manual_seed(derive_seed(recipe.seed, "head", pooling.kind))
    network = create_model(recipe.model.name, num_classes=model.num_classes, **values)
    head = network.get_submodule("pooling")
    for part in head.modules():
        if (reason := export_hints(part).not_exportable) is not None:
            raise ConfigError(
                f"few_shot.heads: {pooling.kind} cannot be exported ({reason}); remove it from the list"
            )
    copy_weights(model, network, "pooling", classifier_name(model))
    width = getattr(head, "channels", None)
    name = pooling.kind if width is None else f"{pooling.kind} of {width} channels"
    return HeadNetwork(name, network.to(next(model.parameters()).device))


def copy_weights(source: Classifier, network: Classifier, *new: str) -> None:
    """Copy tensors of equal name and shape from *source* to *network*, except those of the parts *new*."""
    own, weights = network.state_dict(), source.state_dict()
    same = {
        name: tensor
        for name, tensor in weights.items()
        if name in own and own[name].shape == tensor.shape and not is_in(name, *new)
    }
    network.load_state_dict({**own, **same})


def reduces_by_components(network: Classifier) -> bool:
    """Check whether the head of *network* reduces channels before a covariance."""
    pooling = getattr(network, "pooling", None)
    return isinstance(pooling, ISqrtPooling | EigenPooling) and hasattr(pooling, "layer_reduce")


@torch.no_grad()
def fit_reduction(pooling: ReducedPooling, maps: Sequence[Tensor]) -> None:
    """Set the dimension reduction of *pooling* to the principal components of *maps*, batches (B, C, H, W).

    The batch norm after the 1x1 convolution subtracts the mean and adds twice the largest negative deviation
    from it, so that no component of these maps is negative.
    """
    count = sum(part[:, 0].numel() for part in maps)
    mean_C = torch.stack([part.double().sum(dim=(0, 2, 3)) for part in maps]).sum(dim=0) / count
    centered = [part.double().permute(0, 2, 3, 1).flatten(end_dim=2) - mean_C for part in maps]
    _, vectors_CC = torch.linalg.eigh(torch.stack([rows.T @ rows for rows in centered]).sum(dim=0))
    components_dC = vectors_CC.flip(1)[:, : pooling.channels].T
    lowest_d = torch.stack([(rows @ components_dC.T).amin(dim=0) for rows in centered]).amin(dim=0)
    convolution: Any = pooling.layer_reduce
    norm: Any = pooling.layer_reduce_bn
    convolution.weight.copy_(components_dC[:, :, None, None])
    norm.running_mean.copy_(components_dC @ mean_C)
    norm.running_var.fill_(1.0 - norm.eps)
    norm.weight.fill_(1.0)
    norm.bias.copy_(-2 * lowest_d)  # twice, because other images may have smaller values


@dataclass(frozen=True, slots=True)
class BlockNetwork:
    """The catalog network `name` with a new GSoP block, the module named `place`."""

    name: str
    network: Classifier
    place: str


def with_gsop_block(name: str, model: Classifier, seed: int) -> BlockNetwork | None:
    """Build a copy of *model*, a ResNet with average pooling, with a GSoP block at the end of its last stage.

    Before training, the block multiplies by `NEUTRAL_SCALE`. Returns `None` for other networks.
    """
    other = f"gsop-net1-{name.removeprefix('dsop-')}"
    if not isinstance(model, ResNet) or other not in CATALOG or model.averaged_classifier() is None:
        return None
    fields = CATALOG[other].config.model_fields
    values = {key: value for key, value in model.config.model_dump().items() if key in fields}
    values["block_stages"] = model.stage_names[-1:]
    torch.manual_seed(derive_seed(seed, "gsop"))
    network = create_model(other, num_classes=model.num_classes, **values)
    copy_weights(model, network)
    place, block = next((n, m) for n, m in network.named_modules() if isinstance(m, GSoPBlock))
    assert block.channel is not None  # noqa: S101  # the default block scales channels
    last = block.channel.excitation.conv
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return BlockNetwork(other, network.to(next(model.parameters()).device).eval(), place)
