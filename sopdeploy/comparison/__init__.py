"""Compare recipes over the same seeds (`sopdeploy compare`)."""

from sopdeploy.comparison.runs import compare
from sopdeploy.comparison.verdict import Comparison

__all__ = ["Comparison", "compare"]
