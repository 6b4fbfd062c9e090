"""Measure the loop after the first deployment, one part at a time.

    python benchmarks/loop.py PART [OPTIONS]      # PART --help describes a part and its options

`order`: labels that the order of `sopdeploy label` needs for the accuracy of a random order (loop_order.py).
"""

import importlib
import sys

PARTS = ("order",)


def main(arguments: list[str]) -> int:
    """Run a part and return its exit status."""
    if not arguments or arguments[0] not in PARTS:
        print(__doc__, file=sys.stderr)
        return 2
    status: int = importlib.import_module(f"loop_{arguments[0]}").main(arguments[1:])
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
