"""Bundles that travel: packed the same way every time, signed, put somewhere and taken from there."""

from sopdeploy.travel.move import Pulled, Pushed, pull, push
from sopdeploy.travel.signed import check_signed, sign

__all__ = ["Pulled", "Pushed", "check_signed", "pull", "push", "sign"]
