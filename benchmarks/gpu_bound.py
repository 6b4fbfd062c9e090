"""Compute how many JPEGs per second one H100 with 16 cores can classify at most, stage by stage.

    PYTHONPATH=.venv/cuda LD_LIBRARY_PATH=.venv/cuda/driver python benchmarks/gpu_bound.py

ResNet-50 in fp16, JPEGs of 500 x 375 pixels, one image per request. Each row is the bound that one stage
alone sets. The CPU time of decoding and of the steps for the GPU is measured, on the stand-in for CUDA or on
a GPU; the other figures are below with their source, and a row that needs one without a source says
`assumed`. Nothing here has run on an H100: the smallest rows are the claim that `make gpu-check` (stage
`http`) tests.
"""

import statistics
from functools import partial
from time import process_time
from typing import NamedTuple

from fast_decode import BATCH, PHOTO, RULES, gpu_rows
from measure import Result, interleaved, make_parser, one_line_errors, report

from sopdeploy.images.pixels import resized_size
from sopdeploy_service.images.decode import EncodedImage, decode
from sopdeploy_service.images.loaders import synthetic_jpeg

CORES = 16
REQUEST = 0.2e-3  # s of CPU per request; measured by request_cpu.py (docs/scaling.md, inputs)
SENT = 0.1e-3  # s to send an image to the inference process; measured by front_ends.py (docs/scaling.md)
RECEIVED = 0.11e-3  # s with the interpreter lock there; measured by front_ends.py (docs/scaling.md)
DECODED_THERE = 0.03e-3  # s of CPU more for a JPEG; measured by jpeg_messages.py, as if it held the lock
# Published: https://www.baseten.co/blog/unlocking-the-full-power-of-nvidia-h100-gpus-for-ml-inference-with-tensorrt/
H100_MEMORY = 3.35e12  # bytes/s, H100 SXM
H100_TO_A100 = 1.6  # of the bandwidth of their memory; assumed to be that of their images/s, too
# Published: https://hawkvelt.id.au/post/2024-08-04-nvidia-h100, 128 GB/s in both directions together
PCIE = 64e9  # bytes/s; the peak, what copies reach is not known
H100_ENGINES = 7  # JPEG decoders; assumed, no source was found
# Published: https://forums.developer.nvidia.com/t/a100-hardware-nvjpeg-batch-decoding-takes-5ms-before-decoding-and-why/228533
# An A100 decodes 5 images of 3840 x 2160 pixels in 5 ms, and one in the same time; assumed: an engine each.
ENGINE_PIXELS = 3840 * 2160 / 5e-3  # pixels/s
# Published: https://github.com/NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets/triton/resnet50
# One A100 of 80 GB, Triton, ONNX Runtime with TensorRT, fp16, 256 concurrent requests.
A100_RESNET50 = 6127.3  # images/s


class Stage(NamedTuple):
    """The images per second that *name* allows alone, and what that follows from."""

    name: str
    bound: float
    origin: str


def decode_seconds(runs: int) -> float:
    """Measure the CPU seconds of decoding one JPEG on a core."""
    work = partial(decode, EncodedImage(synthetic_jpeg(PHOTO, 0)), RULES, max_bytes=10**9, max_pixels=10**8)
    (seconds,) = interleaved((work,), runs=runs, warmups=3, clock=process_time)
    return statistics.median(seconds)


def stages(runs: int) -> list[Stage]:
    """Compute the bound of every stage."""
    header, resize, upload, _, _ = (row.ours * 1e-6 for row in gpu_rows(runs))
    on_core = decode_seconds(runs)
    http = REQUEST + SENT + RECEIVED
    pixels, image = PHOTO[0] * PHOTO[1], 3 * RULES.crop**2
    width, height = resized_size(PHOTO, RULES)
    # The copy to one batch and the layout of the input read and write the pixels of the file, Resize reads
    # them; Resize writes the resized pixels, and the layout of the output reads and writes them.
    resize_bytes = 3 * (5 * pixels + 3 * width * height)
    return [
        Stage("decode on 16 cores", CORES / on_core, "measured"),
        Stage("16 cores, decoding on them", CORES / (on_core + upload + http), "measured"),
        Stage(
            "16 cores, decoding on the GPU",
            CORES / (header + resize + upload + http + DECODED_THERE),
            "measured",
        ),
        Stage("decode on the GPU", H100_ENGINES * ENGINE_PIXELS / pixels, f"{H100_ENGINES} engines assumed"),
        Stage("resize on the GPU", H100_MEMORY / resize_bytes, "estimated from published"),
        Stage("resized pixels to the host", PCIE / (3 * width * height), "estimated from published"),
        Stage(f"upload, {BATCH} images", PCIE / image, "estimated from published"),
        Stage("run", A100_RESNET50 * H100_TO_A100, f"{H100_TO_A100} times an A100 assumed"),
        # Collecting and uploading a batch do not hold the lock.
        Stage("response: the lock of the inference process", 1 / (RECEIVED + DECODED_THERE), "measured"),
    ]


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=100, help="timed runs of what is measured here")
    arguments = parser.parse_args()
    with one_line_errors():
        found = stages(arguments.runs)
    results = [
        Result(case=f"{stage.name} ({stage.origin})", ours=stage.bound, unit="images/s", runs=arguments.runs)
        for stage in found
    ]
    report(results, as_json=arguments.json)


if __name__ == "__main__":
    main()
