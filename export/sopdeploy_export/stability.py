"""Measure which answers stay the same with another decoder, resampling filter, precision or runtime.

The margin of a photograph is the difference of its two largest logits. Its loss in a variant is how much less
its class leads there; the class changes where the loss exceeds the margin. The threshold is a quantile of the
largest losses of the photographs with the correction of split conformal prediction (Angelopoulos and Bates,
2021, section 1): it assumes no distribution, only that new photographs are like these. Losses of photographs
that the network was trained on are larger, so a threshold from them is higher than it has to be.

For decoders and filters that are not measured, filters, colors and noise are varied in several ways each, and
`_RESERVE` is a factor on the threshold. docs/benchmarks/stable.md shows what a variant changes that the
threshold has not seen.

Letters: P photographs, V variants.
"""

import importlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pydantic
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.data.datasets.folder import FolderConfig
from sopdeploy.data.image_files import ImageFiles, hash_images
from sopdeploy.data.near import groups_of_files, signature
from sopdeploy.data.sources import open_data
from sopdeploy.decision import Stability, Variant, lead
from sopdeploy.environment import openvino_core
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.images.formats import open_image
from sopdeploy.images.pixels import MAX_ASPECT_RATIO, load_reduced, preprocess_image, resized_size, to_rgb
from sopdeploy.images.preprocess import Pixels, Preprocess
from sopdeploy_export.graph import evenly_spread
from sopdeploy_export.parity.findings import LOGITS
from sopdeploy_export.parity.onnx_file import file_outputs, open_session

_LEVEL = 0.95
_RESERVE = 1.15  # chosen on the photographs of docs/benchmarks/stable.md
MAX_PHOTOGRAPHS = 200
_TIMED = 10  # photographs that give the time of the others
_DECODERS = {  # options of nvImageCodec's decoder for CPUs, which is libjpeg-turbo
    "fast DCT": ":fancy_upsampling=1 :fast_idct=1",
    "box upsampling of colors": ":fancy_upsampling=0",
}
_PARTS = 10_000  # of a logit: what is recorded does not depend on the threads of a runtime
_SEEDS = {f"noise of one gray level, draw {number}": 42 + number for number in (1, 2, 3, 4)}

Decoder = Callable[[bytes], Image.Image | None]
ComputeLogits = Callable[[NDArray[np.uint8]], NDArray[np.float32]]  # (n, H, W, 3) to logits (n, C)


class Photographs(NamedTuple):
    """Images to measure on, and whether the network was trained on them."""

    images: ImageFiles
    fitted: bool


def find_photographs(checkpoint: Checkpoint) -> Photographs | None:
    """Find images of the run of *checkpoint*: held-out ones or, if there are none, training images.

    None if the run had no folder, or if the folder does not hold its training images any more.
    """
    try:
        config = pydantic.TypeAdapter(FolderConfig).validate_python(checkpoint.training["recipe"]["data"])
        split = open_data(config)
    except (KeyError, ConfigError, DataError, pydantic.ValidationError):
        return None
    if not isinstance(split.train, ImageFiles) or not isinstance(split.held_out, ImageFiles):
        return None
    hashes = checkpoint.image_hashes.numpy()
    train, held_out = (_spread(part) for part in (split.train, split.held_out))
    train = train.select(np.isin(hash_images(train), hashes))
    held_out = held_out.select(~np.isin(hash_images(held_out), hashes))
    if not len(train):
        return None
    return Photographs(held_out, fitted=False) if len(held_out) else Photographs(train, fitted=True)


def measure_stability(
    file: Path,
    float32: onnx.ModelProto | None,
    photographs: Photographs,
    rules: Preprocess,
    batch: int,
    on_seconds_left: Callable[[float], None] = lambda _: None,
) -> Stability:
    """Measure the threshold of stable answers for the exported *file*, at most `MAX_PHOTOGRAPHS` images.

    *float32* is the graph before its conversion to another precision, None for fp32. Images run in batches of
    at most *batch*. Of near-duplicates, one is used. *on_seconds_left* is called after `_TIMED` of them.
    Raises `DataError` for an image that cannot be read.
    """
    images = _spread(photographs.images)
    signatures = np.stack([signature(images[index][0]) for index in range(len(images))])
    first = np.unique(groups_of_files(images, signatures), return_index=True)[1].tolist()
    started = time.monotonic()

    def read(number: int) -> bytes:
        if number == _TIMED:
            on_seconds_left((time.monotonic() - started) * (len(first) / _TIMED - 1))
        return images.read(first[number])

    names, leads = compute_leads(file, float32, map(read, range(len(first))), rules, batch)
    return fit_stability(names, leads, fitted=photographs.fitted)


def compute_leads(
    file: Path, float32: onnx.ModelProto | None, images: Iterable[bytes], rules: Preprocess, batch: int
) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Compute the leads (P, 1 + V) of the classes of image files, exact and in the variants, and their names.

    The other arguments are those of `measure_stability`.
    """
    run, runtimes, decoders = _run_with(open_session(file), batch), other_runtimes(file), other_decoders()
    if float32 is not None:
        runtimes["float32"] = _run_with(open_session(float32), batch)
    names: tuple[str, ...] = ()
    leads = []
    for image in images:
        pixels = image_variants(image, rules, decoders)
        logits = [*run(np.stack(list(pixels.values())))]
        logits += [other(pixels["exact"][None])[0] for other in runtimes.values()]
        leads.append(lead(np.stack(logits), np.full(len(logits), logits[0].argmax())))
        names = (*pixels, *runtimes)[1:]
    return names, np.array(leads)


def fit_stability(names: tuple[str, ...], leads_P1V: NDArray[np.float64], *, fitted: bool) -> Stability:
    """Compute the threshold from the leads (P, 1 + V) of the classes of photographs: exact, then in variants.

    Each photograph is counted as stable or not by the threshold of the others.
    """
    margins_P, losses_PV = leads_P1V[:, 0], leads_P1V[:, :1] - leads_P1V[:, 1:]
    worst_P = losses_PV.max(axis=1)
    above_others_P = np.array(
        [margin > _RESERVE * quantile(np.delete(worst_P, index)) for index, margin in enumerate(margins_P)]
    )
    threshold = max(0.0, _RESERVE * quantile(worst_P))
    return Stability(
        threshold=None if threshold == math.inf else math.ceil(threshold * _PARTS) / _PARTS,
        level=_LEVEL,
        num_images=len(margins_P),
        photographs="training" if fitted else "held-out",
        variants=tuple(
            Variant(name=name, num_flips=int((leads < 0).sum()), largest=round(float(loss) * _PARTS) / _PARTS)
            for name, leads, loss in zip(names, leads_P1V.T[1:], losses_PV.max(axis=0), strict=True)
        ),
        num_stable=int(above_others_P.sum()),
        num_flips=int((above_others_P & (leads_P1V.min(axis=1) < 0)).sum()),
    )


def quantile(losses_P: NDArray[np.float64]) -> float:
    """Return a bound that the loss of one more photograph exceeds with probability 1 - `_LEVEL` at most.

    It is the loss with rank ceil(`_LEVEL` (P + 1)), infinite if there are fewer photographs than that.
    """
    rank = math.ceil(_LEVEL * (len(losses_P) + 1) - 1e-9)  # a product such as 95.00000000000001 is 95
    return float(np.sort(losses_P)[rank - 1]) if rank <= len(losses_P) else math.inf


def image_variants(file: bytes, rules: Preprocess, decoders: Mapping[str, Decoder]) -> dict[str, Pixels]:
    """Compute the input of the network from an image file: exact, and by other decoding and resampling."""
    upright, reduced = to_rgb(open_image(file), rules), open_image(file)
    upright.info = {}  # its orientation is that of the file
    exact = preprocess_image(upright, rules)
    load_reduced(reduced, file, rules)
    is_strip = max(upright.size) > MAX_ASPECT_RATIO * min(upright.size)  # `center_crop` resizes a part of it
    size = upright.size if is_strip else resized_size(upright.size, rules)
    like_opencv = functional.interpolate(  # between the nearest pixels, without antialiasing
        torch.from_numpy(np.array(upright)).permute(2, 0, 1)[None], size[::-1], mode=rules.interpolation
    )
    brightness, *colors = upright.convert("YCbCr").split()
    colors = [color.reduce(2).resize(upright.size, Image.Resampling.BOX) for color in colors]
    noise = {
        name: np.random.default_rng(seed).choice(np.array([-1, 1], np.int16), exact.shape)
        for name, seed in _SEEDS.items()
    }
    variants = {
        "scaled decoding": reduced,
        "box resampling": upright.resize(size, Image.Resampling.BOX),
        "resampling of OpenCV": Image.fromarray(like_opencv[0].permute(1, 2, 0).contiguous().numpy()),
        "colors at half resolution": Image.merge("YCbCr", (brightness, *colors)).convert("RGB"),
        **{name: decode(file) or upright for name, decode in decoders.items()},
    }
    return {
        "exact": exact,
        **{name: np.clip(exact + change, 0, 255).astype(np.uint8) for name, change in noise.items()},
        **{name: preprocess_image(image, rules) for name, image in variants.items()},
    }


def other_decoders() -> dict[str, Decoder]:
    """Open decoders of nvImageCodec, if it is installed; they return None unless the file is an RGB JPEG."""
    if find_spec("nvidia") is None or find_spec("nvidia.nvimgcodec") is None:
        return {}
    with _without_stderr():  # where it prints that it finds no libraries for GPUs
        codec: Any = importlib.import_module("nvidia.nvimgcodec")
    params = codec.DecodeParams(color_spec=codec.ColorSpec.SRGB, apply_exif_orientation=False)
    cpu = {"device_id": codec.NVIMGCODEC_DEVICE_CPU_ONLY, "backends": [codec.Backend(codec.CPU_ONLY)]}

    def decode(decoder: Any, file: bytes) -> Image.Image | None:
        opened = open_image(file)
        is_jpeg = (opened.format, opened.mode) == ("JPEG", "RGB")
        if not is_jpeg or (decoded := decoder.decode(file, params=params)) is None:
            return None
        image = Image.fromarray(np.asarray(decoded.cpu()))
        image.info = opened.info  # includes the EXIF orientation
        return image

    opened = {name: codec.Decoder(**cpu, options=options) for name, options in _DECODERS.items()}
    return {name: partial(decode, decoder) for name, decoder in opened.items()}


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard what C libraries and this process write to the descriptor of stderr."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def other_runtimes(file: Path) -> dict[str, ComputeLogits]:
    """Open *file* in the other runtimes for CPUs that are installed and accept it, by name."""
    if find_spec("openvino") is None:
        return {}
    try:
        model = openvino_core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError:  # an operator that it does not have
        return {}
    return {"OpenVINO": lambda pixels: np.asarray(model([pixels])[LOGITS])}


def _run_with(session: ort.InferenceSession, batch: int) -> ComputeLogits:
    return lambda pixels: file_outputs(session, pixels, min(batch, len(pixels)))[LOGITS]


def _spread(images: ImageFiles) -> ImageFiles:
    """Select at most `MAX_PHOTOGRAPHS` images, evenly spread over the sorted paths, so over all classes."""
    chosen = np.zeros(len(images), np.bool_)
    chosen[evenly_spread(len(images), MAX_PHOTOGRAPHS)] = True
    return images.select(chosen)
