"""The preprocessing rules of a network of the user: given, or read from its transform or from the network.

Networks of timm carry the rules of their published weights, as `pretrained_cfg`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.admit.network import unwrap
from sopdeploy_export.options import Takes
from sopdeploy_export.pixels.compare import TrainedPixels
from sopdeploy_export.pixels.explain import describe_differences
from sopdeploy_export.pixels.transform import Transform


def read_pixels(
    transform: Callable[..., Any] | Transform | None, takes: Takes | None
) -> TrainedPixels | None:
    """Run *transform* on photos; None without one. The arguments and errors are those of `export_network`."""
    if transform is None:
        return None
    if not isinstance(transform, Transform):
        transform = Transform(transform, takes=takes)
    return TrainedPixels(transform)


def choose_rules(
    network: nn.Module, given: Preprocess | None, pixels: TrainedPixels | None
) -> Preprocess:
    """Return the rules that were *given*, or else those of *pixels* or *network*; raises `ConfigError` without."""
    if given is not None:
        return given
    if pixels is not None:
        return pixels.read_rules()
    published = read_published(network)
    if published is None:
        raise ConfigError(
            "missing; the network does not say how images become its input, so give the transform of its "
            "validation or preprocessing rules",
            setting="preprocess",
            remedies={"transform": None, "preprocess": "imagenet"},
        )
    return published


def read_published(network: nn.Module) -> Preprocess | None:
    """Return the rules in the `pretrained_cfg` of *network*; None if it has none that can be read."""
    config = getattr(unwrap(network), "pretrained_cfg", None)
    if not isinstance(config, Mapping):
        as_dict = getattr(config, "to_dict", None)
        config = as_dict() if callable(as_dict) else None
    if not isinstance(config, Mapping) or "mean" not in config:
        return None
    try:
        return Preprocess.from_timm(config)
    except ConfigError:
        return None


def warn_of_published_rules(
    network: nn.Module, given: Preprocess | None, pixels: TrainedPixels | None
) -> tuple[str, ...]:
    """Return a warning if the rules *given* are not those of *network*, and no *pixels* of a training decide."""
    published = read_published(network)
    if given is None or pixels is not None or published is None:
        return ()
    differences = describe_differences(published, given)
    if not differences:
        return ()
    return (
        f"pretrained_cfg of the network differs from the preprocessing rules: it {'; it '.join(differences)}; the "
        "transform of the validation (--transform) decides",
    )
