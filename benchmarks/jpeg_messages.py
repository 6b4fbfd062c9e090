"""CPU time of the inference process per image: JPEGs that it decodes on its GPU against decoded pixels.

    PYTHONPATH=.venv/cuda LD_LIBRARY_PATH=.venv/cuda/driver python benchmarks/jpeg_messages.py

One front end, a thread here whose CPU time is subtracted, sends JPEGs of 500 x 375 pixels or what they
become. Messages, batches, resizing (on the stand-in for CUDA, or a GPU) and results are real; the network is
simulated, and the decoder returns images that are on the device already.
"""

import asyncio
import socket
import statistics
import threading
import time
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from fast_decode import PHOTO, on_device
from measure import Result, make_parser, one_line_errors, report
from serving_ours import fake_model

from sopdeploy_service.front_ends import channel, control
from sopdeploy_service.front_ends.channel import HEADER, IMAGE_HEAD, JPEG_HEAD, RESULT_HEAD, MessageKind
from sopdeploy_service.front_ends.inference_process import InferenceProcess
from sopdeploy_service.images import loaders
from sopdeploy_service.images.device_resize import DeviceResize
from sopdeploy_service.images.loaders import synthetic_jpeg
from sopdeploy_service.images.nvimagecodec import NvImageCodec
from sopdeploy_service.inference.registry import ModelRegistry
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import LARGEST_DECODE_BATCH, Settings

MODEL = replace(fake_model(0.0, 0.0, 32), decode="nvimagecodec")
WINDOW = LARGEST_DECODE_BATCH  # images without a result; of more, some are left to the front end
WARM = 200  # images that are not measured


def simulated_decoder() -> NvImageCodec:
    """Create the loader with a decoder that returns images on the device at once."""
    codec, resize = import_module("nvidia.nvimgcodec"), DeviceResize()
    decoded = [on_device(PHOTO) for _ in range(LARGEST_DECODE_BATCH)]
    for image in decoded:
        image.shape = image.__cuda_array_interface__["shape"]
    decoder = SimpleNamespace(decode=lambda files, **_: decoded[: len(files)])
    library: Any = SimpleNamespace(
        CodeStream=codec.CodeStream,
        ColorSpec=codec.ColorSpec,
        DecodeParams=codec.DecodeParams,
        Decoder=lambda **_: decoder,
    )
    return NvImageCodec(library, 0, (), resize)


def send(connection: socket.socket, kind: MessageKind, count: int, found: list[float]) -> None:
    """Send *count* images of *kind*; append the CPU seconds per image of the other threads to *found*."""
    number = 1
    while number:  # the models, counted backwards
        _, number, _ = channel.receive_blocking(connection)
    head = IMAGE_HEAD.pack(0, False, time.monotonic(), float("inf"))
    side = MODEL.bundle.manifest.preprocess.crop
    image = bytes(3 * side * side)
    if kind == MessageKind.JPEG:
        image = JPEG_HEAD.pack(*PHOTO, 1) + synthetic_jpeg(PHOTO, 0)
    sent = ended = 0
    began = 0.0
    while ended < count:
        if ended == WARM:
            began = time.process_time() - time.thread_time()
        while sent < count and sent - ended < WINDOW:
            sent += 1
            connection.sendall(HEADER.pack(kind, sent, len(head) + len(image)) + head + image)
        received, _, result = channel.receive_blocking(connection)
        if received == MessageKind.RESULT:
            ended += 1
            if RESULT_HEAD.unpack_from(result)[0] != 0:
                raise RuntimeError("the inference process has not decoded a JPEG")
    found.append((time.process_time() - time.thread_time() - began) / (count - WARM))


async def seconds_per_image(kind: MessageKind, count: int) -> float:
    """Measure the CPU seconds of an inference process for an image of *kind*."""
    settings, found = Settings(), []  # type: ignore[var-annotated]
    ours, theirs = control.pair()
    registry = ModelRegistry({"model": MODEL}, settings, Metrics(), store=None)
    process = InferenceProcess(registry, theirs, settings, [])
    front_end, channel_end = socket.socketpair()
    with channel_end:
        control.send_files(ours, b"0", channel_end.fileno())
    sender = threading.Thread(target=send, args=(front_end, kind, count, found))
    sender.start()
    running = asyncio.create_task(process.run())
    await asyncio.to_thread(sender.join)
    ours.close()
    await running
    return float(found[0])


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2000)
    arguments = parser.parse_args()
    sides: dict[MessageKind, list[float]] = {MessageKind.JPEG: [], MessageKind.IMAGE: []}
    with one_line_errors():
        decoder = simulated_decoder()
        loaders.gpu_loader = lambda: decoder  # type: ignore[assignment]
        for _ in range(arguments.rounds):
            for kind, values in sides.items():
                values.append(1e6 * asyncio.run(seconds_per_image(kind, arguments.images)))
    ours, other = (statistics.median(values) for values in sides.values())
    case = "inference process, a JPEG that it decodes"
    result = Result(case=case, against="pixels", ours=ours, other=other, unit="cpu-us", runs=arguments.rounds)
    report([result], as_json=arguments.json)


if __name__ == "__main__":
    main()
