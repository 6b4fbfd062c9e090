"""Weight files of timm, for its networks in the catalog (`timm:NAME`), under timm's own names.

How timm prepares pictures depends on who trained the weights. Files of its hub lie beside a `config.json`
that says it; without one, what timm says of its default weights is taken.
"""

import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from sopdeploy.backbones.timm_backbone import import_timm
from sopdeploy.errors import WeightsError
from sopdeploy.importers.resnet_layout import matrix
from sopdeploy.importers.source import Translation, renamed
from sopdeploy.importers.weight_file import WeightFile
from sopdeploy.preprocess import Preprocess

PREFIX = "timm:"
CARD = "config.json"
MOST_BYTES = 1 << 16


class TimmNetwork:
    """Any network of timm that the catalog takes."""

    project = "timm"

    def recognises(self, file: WeightFile, name: str) -> bool:
        """Say whether the user asks for timm's network."""
        return name.startswith(PREFIX) and not file.is_matconvnet

    def translate(self, file: WeightFile, name: str) -> Translation:
        """Return the network as it is."""
        backbone = name.removeprefix(PREFIX)
        import_timm(backbone)
        stored = importlib.import_module("timm").get_pretrained_cfg(backbone).to_dict()
        card = read_card(file.path.with_name(CARD))
        classifier = stored.get("classifier")
        if not isinstance(classifier, str):
            raise WeightsError(f"{file.path}: timm's {backbone} has no single classifier to count classes by")
        return Translation(
            looks_like=f"timm's {backbone}",
            name=name,
            mapped=renamed(file, lambda own: own),
            num_classes=len(matrix(file.path, file.tensors, f"{classifier}.weight")),
            preprocess=preprocess_of(file.path, {**stored, **card}),
            labels="imagenet",
            notes=(f"preprocessing from {CARD} beside the file" if card else NO_CARD,),
        )


NO_CARD = f"no {CARD} beside the file: preprocessing is that of timm's default weights"


def read_card(path: Path) -> Mapping[str, Any]:
    """Return what a hub's card says of preprocessing, nothing where there is none."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return {}
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = card.get("pretrained_cfg") if isinstance(card, dict) else None
    return found if isinstance(found, dict) else {}


def preprocess_of(path: Path, card: Mapping[str, Any]) -> Preprocess:
    """Return timm's evaluation of *card*: the crop's share of the shorter side, mean, deviation."""
    if card.get("crop_mode", "center") != "center":
        raise WeightsError(f"{path}: timm crops {card['crop_mode']!r} for it, which has no form here")
    try:
        crop = int(card["input_size"][-1])
        return Preprocess(
            resize=max(crop, math.floor(crop / float(card["crop_pct"]))),
            crop=crop,
            interpolation=card["interpolation"],
            mean=tuple(card["mean"]),
            std=tuple(card["std"]),
        )
    except (
        pydantic.ValidationError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        ZeroDivisionError,
    ) as problem:
        raise WeightsError(
            f"{path}: timm's preprocessing of it has no form here; see {CARD} beside it"
        ) from problem
