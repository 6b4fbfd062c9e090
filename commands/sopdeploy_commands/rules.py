"""Preprocessing rules that an option names: a convention, rules of timm or torchvision, or a file."""

import importlib
from typing import Any

import pydantic

from sopdeploy.base.config import first_problem, parse_json
from sopdeploy.base.files import MAX_TEXT_BYTES, read_file
from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import CONVENTIONS, Preprocess

EXAMPLE = (
    f"{', '.join(CONVENTIONS)}, timm:resnet18, torchvision:ResNet18_Weights.IMAGENET1K_V1 or FILE.json; "
    "imagenet:384 for images of 384 x 384"
)


def read_preprocess(text: str | None) -> Preprocess:
    """Read the preprocessing rules that *text* names.

    It is a convention such as `imagenet`, or `imagenet:SIDE`, `timm:NAME`,
    `torchvision:WEIGHTS`, or a file. After `fast:` or `scaled:`, the decoding of these rules becomes
    "fast" or "scaled".

    Raises `ConfigError` for an unknown name and for a file that is not a `Preprocess`.
    """
    if not text:
        raise ConfigError(f"missing; give {EXAMPLE}", setting="preprocess")
    prefix, _, name = text.partition(":")
    if prefix in ("fast", "scaled"):
        rules = read_preprocess(name)
        try:
            return Preprocess(**{**rules.model_dump(), "decoding": prefix})
        except pydantic.ValidationError as error:
            raise ConfigError(first_problem(error), setting="preprocess", value=text) from error

    values: Any = None  # of a file, for the message of an error
    try:
        if prefix in CONVENTIONS and (name.isdecimal() or text == prefix):
            return Preprocess.of_convention(prefix, int(name or 224))
        # These prefixes name rules that a package publishes; any other text is the name of a file.
        if prefix == "timm":
            from sopdeploy.models.timm_networks import import_timm

            config = import_timm(name).get_pretrained_cfg(name)
            if config is None:
                raise ValueError("timm publishes no preprocessing for it")
            return Preprocess.from_timm(config.to_dict())

        if prefix == "torchvision":
            weights = importlib.import_module("torchvision.models").get_weight(name)
            return Preprocess.from_torchvision(weights.transforms())
        values = parse_json(read_file(text, MAX_TEXT_BYTES))
        return Preprocess.model_validate(values)
    except (AttributeError, KeyError, OSError, ValueError) as error:
        reason = str(error.strerror) if isinstance(error, OSError) else str(error)
        if isinstance(error, pydantic.ValidationError):
            reason = first_problem(error, values)
        elif prefix == "torchvision":
            reason = f"torchvision has no weights {name}"
        message = f"cannot be read ({reason}); give {EXAMPLE}"
        raise ConfigError(message, setting="preprocess", value=text) from error
