"""`sopdeploy compare`: recipes over the same seeds, and what may be said of the difference."""

from sopdeploy.compare.compare import compare
from sopdeploy.compare.verdict import Comparison

__all__ = ["Comparison", "compare"]
