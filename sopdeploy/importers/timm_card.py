"""The card that a file of timm's hub lies beside: how the pictures were prepared that it was measured on."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from sopdeploy.errors import WeightsError
from sopdeploy.preprocess import Preprocess

CARD = "config.json"
MOST_BYTES = 1 << 16
FROM_CARD = f"preprocessing from {CARD} beside the file"


def read_card(weights: Path) -> Mapping[str, Any]:
    """Return what the card beside *weights* says of preprocessing, nothing where there is none."""
    path = weights.with_name(CARD)
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
