"""`sopdeploy compare`: recipes over the same seeds, and what may be said of the difference."""

from sopdeploy.comparison.runs import compare
from sopdeploy.comparison.verdict import Comparison

__all__ = ["Comparison", "compare"]
