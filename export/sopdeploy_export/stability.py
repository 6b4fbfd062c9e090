"""Measure which answers stay the same with another decoder, resampling filter, precision or runtime.

The margin of a photograph is the difference of its two largest logits. Its loss in a variant is how much less
its class leads there; the class changes where the loss exceeds the margin. The threshold is a quantile of the
largest losses of the photographs with the correction of split conformal prediction (Angelopoulos and Bates,
2021, section 1): it assumes no distribution, only that new photographs are like these. Losses of photographs
that the network was trained on are larger, so a threshold from them is higher than it has to be.

Letters: P photographs, V variants.
"""

import importlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from sopdeploy.data.image_files import ImageFiles, find_unreadable, hash_images
from sopdeploy.data.near import groups_of_files, signature
from sopdeploy.data.sources import DataConfig, open_data
from sopdeploy.decision import Stability, Variant, lead
from sopdeploy.environment import openvino_core
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.images.formats import open_image
from sopdeploy.images.pixels import MAX_ASPECT_RATIO, load_reduced, preprocess_image, resized_size, to_rgb
from sopdeploy.images.preprocess import Pixels, Preprocess
from sopdeploy_export.graph import evenly_spread
from sopdeploy_export.parity.findings import LOGITS
from sopdeploy_export.parity.onnx_file import file_outputs, open_session

_LEVEL = 0.96  # of the thresholds in docs/stable.md, which of 90 to 99 % keeps most answers and few flips
MAX_PHOTOGRAPHS = 200
OTHER_DECODING = {  # options of nvImageCodec's decoder for CPUs, which is libjpeg-turbo
    "fast DCT": ":fancy_upsampling=1 :fast_idct=1",
    "box upsampling of colors": ":fancy_upsampling=0",
}
_PARTS = 10_000  # of a logit: what is recorded does not depend on the threads of a runtime
_SEED = 43

ComputeLogits = Callable[[NDArray[np.uint8]], NDArray[np.float32]]  # (n, H, W, 3) to logits (n, C)


class Photographs(NamedTuple):
    """Images to measure on, and whether the network was trained on them."""

    images: ImageFiles
    fitted: bool


def find_photographs(checkpoint: Checkpoint) -> Photographs | None:
    """Find the images of the run of *checkpoint*: held-out ones or, if there are none, training images.

    None if the images are no files, or if the folder does not hold the images of the run any more.
    """
    data = checkpoint.training.get("recipe", {}).get("data")
    if data is None or not len(checkpoint.image_hashes):
        return None
    try:
        split = open_data(pydantic.TypeAdapter(DataConfig).validate_python(data))
    except (ConfigError, DataError, pydantic.ValidationError):
        return None
    if not isinstance(split.train, ImageFiles) or not isinstance(split.held_out, ImageFiles):
        return None
    train, held_out = (_spread(part) for part in (split.train, split.held_out))
    is_fitted, was_fitted = (
        np.isin(hash_images(part), checkpoint.image_hashes.numpy()) for part in (train, held_out)
    )
    if not is_fitted.any():
        return None
    unseen = held_out.select(~was_fitted)
    return Photographs(unseen, fitted=False) if len(unseen) else Photographs(train, fitted=True)


def measure_stability(
    file: Path, float32: onnx.ModelProto | None, photographs: Photographs, rules: Preprocess, batch: int
) -> Stability | None:
    """Measure the threshold of stable answers for the exported *file*, at most `MAX_PHOTOGRAPHS` images.

    *float32* is the graph before its conversion to another precision, None for fp32. Images run in batches of
    at most *batch*. None if no image can be read.
    """
    run, runtimes = _run_with(open_session(file), batch), other_runtimes(file)
    if float32 is not None:
        runtimes["float32"] = _run_with(open_session(float32), batch)
    ways = image_variants()
    leads: list[list[float]] = []
    for image in _one_per_group(_spread(photographs.images)):
        exact = preprocess_image(open_image(image), rules)
        pixels = [exact, *(exact if (made := way(image, rules)) is None else made for way in ways.values())]
        logits = [*run(np.stack(pixels)), *(other(exact[None])[0] for other in runtimes.values())]
        leads.append(lead(np.stack(logits), np.full(len(logits), logits[0].argmax())).tolist())
    return fit_stability((*ways, *runtimes), np.array(leads), fitted=photographs.fitted) if leads else None


def fit_stability(names: tuple[str, ...], leads_P1V: NDArray[np.float64], *, fitted: bool) -> Stability:
    """Compute the threshold from the leads (P, 1 + V) of the classes of photographs: exact, then in variants.

    Each photograph is counted as stable or not by the threshold of the others.
    """
    margins_P, losses_PV = leads_P1V[:, 0], leads_P1V[:, :1] - leads_P1V[:, 1:]
    worst_P = losses_PV.max(axis=1)
    above_others_P = np.array(
        [margin > quantile(np.delete(worst_P, index)) for index, margin in enumerate(margins_P)]
    )
    threshold = max(0.0, quantile(worst_P))
    return Stability(
        threshold=None if threshold == math.inf else math.ceil(threshold * _PARTS) / _PARTS,
        level=_LEVEL,
        images=len(margins_P),
        photographs="training" if fitted else "held-out",
        variants=tuple(
            Variant(name=name, flips=int((leads < 0).sum()), largest=round(float(loss) * _PARTS) / _PARTS)
            for name, leads, loss in zip(names, leads_P1V.T[1:], losses_PV.max(axis=0), strict=True)
        ),
        stable=int(above_others_P.sum()),
        flips=int((above_others_P & (leads_P1V.min(axis=1) < 0)).sum()),
    )


def quantile(losses_P: NDArray[np.float64]) -> float:
    """Return a bound that the loss of one more photograph exceeds with probability 1 - `_LEVEL` at most.

    It is the loss with rank ceil(`_LEVEL` (P + 1)), infinite if there are fewer photographs than that.
    """
    rank = math.ceil(_LEVEL * (len(losses_P) + 1) - 1e-9)
    return float(np.sort(losses_P)[rank - 1]) if rank <= len(losses_P) else math.inf


# (file, rules) -> pixels of the network's input, or None if the variant does not apply to the file
ImageVariant = Callable[[bytes, Preprocess], Pixels | None]


def image_variants() -> dict[str, ImageVariant]:
    """Return the variants of decoding and resampling that can be computed here, by name."""
    return {
        **({name: _other_decoder(options) for name, options in OTHER_DECODING.items()} if _HAS_CODEC else {}),
        "scaled decoding": _reduced,
        "box resampling": _resampled(lambda image, size: image.resize(size, Image.Resampling.BOX)),
        "resampling of OpenCV": _resampled(_resize_like_opencv),
        "noise of one gray level": _with_noise,
    }


_HAS_CODEC = find_spec("nvidia") is not None and find_spec("nvidia.nvimgcodec") is not None


def _reduced(file: bytes, rules: Preprocess) -> Pixels:
    image = open_image(file)
    load_reduced(image, file, rules)
    return preprocess_image(image, rules)


def _other_decoder(options: str) -> ImageVariant:
    """Return a variant that decodes RGB JPEGs by nvImageCodec on the CPU with *options*."""
    with _no_stderr():  # it writes lines about decoders for GPUs that are not installed
        nvimgcodec: Any = importlib.import_module("nvidia.nvimgcodec")
    decoder = nvimgcodec.Decoder(
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
        options=options,
    )
    params = nvimgcodec.DecodeParams(
        color_spec=nvimgcodec.ColorSpec.SRGB, apply_exif_orientation=False, allow_any_depth=False
    )

    def decode(file: bytes, rules: Preprocess) -> Pixels | None:
        opened = open_image(file)
        if (opened.format, opened.mode) != ("JPEG", "RGB"):
            return None
        if (decoded := decoder.decode(file, params=params)) is None:
            return None
        image = Image.fromarray(np.asarray(decoded.cpu()))
        image.info = opened.info  # includes the EXIF orientation
        return preprocess_image(image, rules)

    return decode


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Discard what libraries write to the standard error of the process."""
    before = os.dup(2)
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _resampled(resize: Callable[[Image.Image, tuple[int, int]], Image.Image]) -> ImageVariant:
    """Return a variant in which *resize* makes the upright RGB image smaller or larger."""

    def preprocess(file: bytes, rules: Preprocess) -> Pixels | None:
        upright = to_rgb(open_image(file), rules)
        upright.info = {}  # its orientation is that of the file
        if max(upright.size) > MAX_ASPECT_RATIO * min(upright.size):
            return None  # `center_crop` resizes a part of such a strip
        return preprocess_image(resize(upright, resized_size(upright.size, rules)), rules)

    return preprocess


def _resize_like_opencv(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Interpolate bilinearly between the four nearest pixels, as `cv2.resize` does, whatever the scale."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = functional.interpolate(pixels, size[::-1], mode="bilinear")
    return Image.fromarray(resized[0].permute(1, 2, 0).contiguous().numpy())


def _with_noise(file: bytes, rules: Preprocess) -> Pixels:
    """Add 1 to half of the values and subtract 1 from the others, the same ones for every file."""
    pixels = preprocess_image(open_image(file), rules).astype(np.int16)
    signs = np.random.default_rng(_SEED).choice(np.array([-1, 1], np.int16), pixels.shape)
    noisy: Pixels = np.clip(pixels + signs, 0, 255).astype(np.uint8)
    return noisy


def other_runtimes(file: Path) -> dict[str, ComputeLogits]:
    """Open *file* in the other runtimes for CPUs that are installed and accept it, by name."""
    if find_spec("openvino") is None:
        return {}
    core: Any = openvino_core()
    try:
        model = core.compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
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


def _one_per_group(images: ImageFiles) -> Iterator[bytes]:
    """Yield the files of *images* that can be read, one of each group of near-duplicates."""
    readable = np.ones(len(images), np.bool_)
    readable[list(find_unreadable(images))] = False
    images = images.select(readable)
    if len(images):
        signatures = np.stack([signature(images[index][0]) for index in range(len(images))])
        for index in np.unique(groups_of_files(images, signatures), return_index=True)[1].tolist():
            yield images.read(index)
