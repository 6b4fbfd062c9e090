"""The history of a link to bundles: the recorded moves, and what they say about the live bundle."""

import os
from pathlib import Path
from typing import Annotated

import pydantic

from sopdeploy.bundle.live import LOG, read_log
from sopdeploy.config import OtherVersionError, StrictModel, Text, validate_format
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.permission import MIN_IMAGES
from sopdeploy.names import LinkPath
from sopdeploy.project import Time
from sopdeploy_commands.promotion.comparison import BundleComparison


class Promotion(StrictModel):
    """One move of the link named `link`, or a refused one: who, when, why, and the figures.

    `before` and `after` are bundles, as paths relative to the folder of the link. `before` is
    None for the first bundle; `comparison` is None if nothing was compared. `num_trained`
    photographs have decided and train from now on, which the log does not tell.
    """

    time: Time
    user: Text
    link: LinkPath
    before: LinkPath | None
    after: LinkPath
    reason: Text
    refused: bool = False
    comparison: BundleComparison | None = None
    num_trained: Annotated[int, pydantic.Field(exclude=True)] = 0


def read_promotions(link: Path) -> list[Promotion]:
    """Read the recorded moves of *link* and the refused ones, the oldest first.

    Fields of a later version are ignored, so that this version can go back after an upgrade. Raises
    `ConfigError` if the log or one of its records cannot be read: a record is not skipped,
    because each attempt and each move counts.
    """
    promotions = []

    for number, fields in read_log(link.parent):
        if fields.get("link") == link.name:
            try:
                promotions.append(validate_format(Promotion, fields, ignore_unknown=True))
            except ValueError as error:
                advice = "; repair or remove this line"
                if isinstance(error, OtherVersionError):  # it names the version to use
                    advice = ""
                log = link.with_name(LOG)
                raise ConfigError(f"{log}: line {number}: {error}{advice}") from error

    return promotions


def read_link(link: Path) -> str | None:
    """Read the path of the bundle to which *link* leads, relative to its folder; None if it is no link."""
    if not link.is_symlink():
        return None
    target = str(link.readlink())
    if not (link.parent / target).is_symlink():
        return target
    return os.path.relpath(os.path.realpath(link), os.path.realpath(link.parent))


def count_comparisons(link: Path) -> int:
    """Count the recorded comparisons with the bundle that *link* leads to; equal ones count once.

    Those on fewer than `MIN_IMAGES` photographs, which let nothing pass, do not count.

    If the last record is of a move that was not made, because its process ended, the next
    comparison repeats that one, which does not count.
    """
    different = set()
    live = read_link(link)
    if live is None:
        return 0

    promotions = read_promotions(link)
    if promotions and not promotions[-1].refused and promotions[-1].after != live:
        promotions.pop()

    for promotion in promotions:
        compared = promotion.comparison
        if promotion.before != live or compared is None:
            continue
        if compared.num_images >= MIN_IMAGES:
            different.add(
                (promotion.after, compared.num_images, compared.wins, compared.losses)
            )

    return len(different)
