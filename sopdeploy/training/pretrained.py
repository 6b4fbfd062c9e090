"""Create a network of the catalog, with or without pretrained weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sopdeploy.errors import SopdeployError
from sopdeploy.models import registry

if TYPE_CHECKING:
    from sopdeploy.models.base import Classifier


def create_model(
    name: str,
    num_classes: int | None = None,
    *,
    pretrained: bool | str | Path = False,
    **config: Any,
) -> "Classifier":
    """Create a network of the catalog, in train mode.

    Args:
        name: A name of `list_models`, or `timm:NAME`, `dsop-timm:NAME` or `head:NAME`.
        num_classes: Number of classes; by default as many as the pretrained weights have, or without
            them as many as the data set of the paper (1000, 100 or 10).
        pretrained: True loads the published ImageNet weights of the backbone, a path loads a checkpoint
            or a weight file of another project. What these do not have, such as branches, a pooling or a
            classifier of other classes, keeps random weights. False loads none.
        **config: Options of the network, which `sopdeploy models NAME` lists.

    Returns:
        The network. It maps normalized float images (B, 3, H, W) to logits (B, classes). A network
        with auxiliary branches returns a `TrainingOutput` in train mode. Its `preprocess` are the
        rules by which the pretrained weights see images, or None.

    Raises:
        ConfigError: An unknown name, option or value, or no weights are published.
        WeightsError: The weights cannot be downloaded or read, or belong to another network.
        CheckpointError: *pretrained* is a damaged checkpoint.

    Examples:
        >>> import torch
        >>> network = sopdeploy.create_model("gsop-net1-efficientnet-lite0", 5, pretrained=True)
        >>> network.preprocess.crop
        224
        >>> network.eval()(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 5])
    """
    if pretrained is False:
        return registry.create_model(name, num_classes=num_classes, **config)

    # The modules that read weight files are imported for these alone.
    from sopdeploy.training.start_weights import (  # noqa: PLC0415
        create_for,
        fit_crop,
        load_start_weights,
        read_weights_file,
    )

    model = registry.CatalogModel(name=name, config=config)
    file: Literal["imagenet"] | Path = "imagenet" if pretrained is True else Path(pretrained)
    with _naming_pretrained():
        weights = read_weights_file(model, file)

        # The classifier is loaded if it has as many classes.
        labels = weights.labels or ()
        classes = num_classes or len(labels) or None
        create = partial(registry.create_model, name, num_classes=classes, **config)
        network = create_for(weights.tensors, create, config)
        load_start_weights(weights, network, labels)
    network.preprocess = fit_crop(weights.preprocess, network)
    return network


@contextmanager
def _naming_pretrained() -> Iterator[None]:
    """Name the argument `pretrained` in errors about `start.weights`, the key of a recipe."""
    try:
        yield
    except SopdeployError as error:
        error.message = error.message.replace("start.weights: ", "pretrained: ")
        if "weights" in error.remedies:
            error.remedies["pretrained"] = error.remedies.pop("weights")
        raise
