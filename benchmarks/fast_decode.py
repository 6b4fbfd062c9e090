"""CPU time of `decode=fast` compared with exact decoding, for JPEGs of up to 4000 x 3000 pixels.

    python benchmarks/fast_decode.py --quick

The server measures the effect on the logits of a bundle when it starts (`/info`).
"""

from functools import partial
from time import process_time

from measure import compare, parse, report

from sopdeploy.images.pixels import load_reduced
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import EncodedImage, decode
from sopdeploy_service.images.loaders import synthetic_jpeg

SIZES = ((4000, 3000), (2048, 1536), (1400, 1050), (500, 375))


def main() -> None:
    """Run from the command line."""
    arguments = parse(__doc__)
    rules = Preprocess(resize=256, crop=224)
    results = []
    for size in SIZES[:2] if arguments.quick else SIZES:
        work = partial(
            decode, EncodedImage(synthetic_jpeg(size, 0)), rules, max_bytes=10**9, max_pixels=10**8
        )
        case = f"decode {size[0]} x {size[1]}"
        runs = 5 if arguments.quick else 15
        results.append(
            compare(case, "exact", partial(work, load=load_reduced), work, runs=runs, clock=process_time)
        )
    report(results, as_json=arguments.json)


if __name__ == "__main__":
    main()
