"""Measures the loop after the first deployment, in parts: keep, label and promote.

    python benchmarks/loop.py keep --json

Each part is a module `loop_PART` with a function `measure(arguments)`, which returns its results.
"""

import importlib

from measure import existing, make_parser, report

PARTS = ("keep", "promote")


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--bundle", type=existing, help="keep: serve it instead of a simulated engine")
    arguments = parser.parse_args()
    results = importlib.import_module(f"loop_{arguments.part}").measure(arguments)
    report(results, as_json=arguments.json, part=arguments.part)


if __name__ == "__main__":
    main()
