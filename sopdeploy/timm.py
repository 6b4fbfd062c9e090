"""The networks of the catalog as networks of timm: importing this module registers those that timm lacks.

    import sopdeploy.timm
    network = timm.create_model("dsop_resnet50", num_classes=10)

A name is that of `sopdeploy models` with `_` in place of `-`. `pretrained=True` loads the published ImageNet weights
of the backbone, other arguments are options of the network, and state dicts are those of `sopdeploy.create_model`.
In train mode, a network with auxiliary heads returns `JoinedHeads`, so that a loss of logits trains them, too.

    python -m sopdeploy.timm train.py --model dsop_resnet50 ...

runs a script, such as timm's own for training, after the registration.
"""

import importlib
import runpy
import sys
from typing import TYPE_CHECKING, Any

from sopdeploy.base.environment import missing_extras
from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import CATALOG, entry

if TYPE_CHECKING:
    from sopdeploy.models.base import Classifier

NAMES = {name.replace("-", "_"): name for name in CATALOG}  # of the catalog, by name of timm
# Arguments that timm gives every network
IN_CHANS, FROM_TIMM = "in_chans", ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def create(
    name: str, *, pretrained: bool = False, num_classes: int | None = None, **options: Any
) -> "Classifier":
    """Create the network that timm calls *name*, with *options* of timm and of the network; 0 classes are none.

    Raises the errors of `sopdeploy.create_model`, and `ConfigError` for other images than those with
    three channels.
    """
    from sopdeploy.training.pretrained import create_model  # noqa: PLC0415 # imports torch

    for option in FROM_TIMM:
        options.pop(option, None)
    if options.pop(IN_CHANS, 3) != 3:
        raise ConfigError(f"{IN_CHANS}: must be 3, the number of colors")
    # The default of timm's script is 0, also for networks without dropout.
    if not options.get("drop_rate", 1):
        del options["drop_rate"]

    network = create_model(NAMES[name], num_classes or None, pretrained=pretrained, **options)
    if num_classes == 0:
        network.reset_classifier(0)
    network.joins_heads = True
    network.pretrained_cfg = describe(name, network)
    return network


def describe(name: str, network: "Classifier") -> dict[str, Any]:
    """Describe the images of *network* as timm does, by the rules of its weights, or by the size in its paper."""
    rules = network.preprocess or Preprocess(crop=entry(NAMES[name]).image_size)
    return {
        "architecture": name,
        "num_classes": network.num_classes,
        "input_size": (3, rules.crop, rules.crop),
        "interpolation": rules.interpolation,
        "crop_pct": rules.crop / rules.resize,
        "mean": rules.mean,
        "std": rules.std,
        "fixed_input_size": False,
        "classifier": network.classifier_name,
    }


def register() -> None:
    """Register the networks of the catalog whose names timm does not have."""
    with missing_extras():
        from timm.models import is_model, register_model  # noqa: PLC0415 # only this module needs it

    for name in NAMES:
        if not is_model(name):

            def entrypoint(*, _name: str = name, **options: Any) -> "Classifier":
                return create(_name, **options)

            entrypoint.__name__ = name
            register_model(entrypoint)


if __name__ == "__main__":
    importlib.import_module(
        "sopdeploy.timm"
    )  # registers the functions of the module of this name
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    register()
