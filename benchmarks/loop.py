"""Measures the loop after the first deployment, in parts: keep, order and promote.

    python benchmarks/loop.py keep --json
    python benchmarks/loop.py order --photos DIR --unknown DIR --weights FILE
    python benchmarks/loop.py promote

Each part is a module `loop_PART` with a function `measure(arguments)`, which returns its results.
"""

import importlib

from measure import existing, make_parser, report

PARTS = ("keep", "order", "promote")


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--bundle", type=existing, help="keep: serve it instead of a simulated engine")
    parser.add_argument("--photos", type=existing, help="order: photographs, <class>/*.jpg")
    parser.add_argument("--unknown", type=existing, help="order: photographs of none of the classes")
    parser.add_argument("--weights", type=existing, help="order: ImageNet weights of EfficientNet-Lite0")
    parser.add_argument("--draws", type=int, default=6, help="order: draws of the photographs")
    arguments = parser.parse_args()
    results = importlib.import_module(f"loop_{arguments.part}").measure(arguments)
    report(results, as_json=arguments.json, part=arguments.part)


if __name__ == "__main__":
    main()
