"""Bundles that travel: packed the same way every time, signed, put somewhere and taken from there."""

from sopdeploy.bundle.signing import check_signed, sign
from sopdeploy.bundle.transfer.push_pull import Pulled, Pushed, pull, push

__all__ = ["Pulled", "Pushed", "check_signed", "pull", "push", "sign"]
