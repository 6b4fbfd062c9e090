"""CPU time of decoding: `decode=fast` compared with exact decoding.

    python benchmarks/fast_decode.py --quick

The server measures the effect of `decode=fast` on the logits of a bundle when it starts (`/info`).
"""

from functools import partial
from time import process_time

from measure import compare, make_parser, report

from sopdeploy.images.pixels import load_reduced
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import EncodedImage, decode
from sopdeploy_service.images.loaders import synthetic_jpeg

SIZES = ((4000, 3000), (2048, 1536), (1400, 1050), (500, 375))
RULES = Preprocess(resize=256, crop=224)


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases and runs, within a minute")
    arguments = parser.parse_args()
    results = []
    for size in SIZES[:2] if arguments.quick else SIZES:
        work = partial(
            decode, EncodedImage(synthetic_jpeg(size, 0)), RULES, max_bytes=10**9, max_pixels=10**8
        )
        case = f"decode {size[0]} x {size[1]}"
        runs = 5 if arguments.quick else 15
        results.append(
            compare(case, "exact", partial(work, load=load_reduced), work, runs=runs, clock=process_time)
        )
    report(results, as_json=arguments.json)


if __name__ == "__main__":
    main()
