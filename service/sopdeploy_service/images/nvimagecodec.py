"""Load JPEGs in batches with NVIDIA's nvImageCodec, and resize them on the same device.

Each decoder thread loads one image. While a batch is decoded, the images of other threads become the next
batch, which is decoded while the first is resized. If the next batch is full, a thread returns to Pillow: the
cores decode what the device cannot.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Condition, Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.images.pixels import MAX_ASPECT_RATIO, resized_size
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.device_resize import DeviceResize
from sopdeploy_service.runtime.base import reason_of
from sopdeploy_service.settings import LARGEST_DECODE_BATCH

MODES = {"RGB", "L"}
_END = b"\xff\xd9"  # of a complete JPEG; NVIDIA's decoders do not report that data is missing
_OPTIONS = ":fancy_upsampling=1"  # chroma interpolation as in libjpeg
THREADS = 4  # of the library, for what its decoders do on the CPU
MAX_BATCH_PIXELS = 50_000_000  # 150 MB of the device, unless a single image has more; two batches are there
MAX_GROUPED_PIXELS = 1_000_000  # of an image that is resized together with others

log = logging.getLogger("sopdeploy.service")


@dataclass(eq=False, slots=True)
class JpegJob:
    """A JPEG *body* of *size* to decode and resize to *target*; sizes are (width, height).

    *pixels* (h, w, 3) is set before *done*, unless the device could not decode the image.
    """

    body: bytes
    size: tuple[int, int]
    target: tuple[int, int]
    interpolation: str
    pixels: NDArray[np.uint8] | None = None
    done: bool = False

    @property
    def area(self) -> int:
        """The pixels of the file."""
        return self.size[0] * self.size[1]


class NvImageCodec:
    """Loads JPEGs at the size to which preprocessing resizes them. Thread-safe.

    *device* is a CUDA device number or a constant of *library*; *backends* are names of its decoder backends.
    *resize* must be on the same device. Raises the library's error if no decoder can be created.
    """

    def __init__(self, library: Any, device: int, backends: tuple[str, ...], resize: DeviceResize) -> None:
        self._library, self._resize = library, resize
        self._params = library.DecodeParams(
            color_spec=library.ColorSpec.SRGB, apply_exif_orientation=False, allow_any_depth=False
        )
        self._decoder = library.Decoder(
            device_id=device,
            max_num_cpu_threads=THREADS,
            backends=[library.Backend(getattr(library, name)) for name in backends],
            options=_OPTIONS,
        )
        self._changed = Condition()
        self._waiting: list[JpegJob] = []  # the next batch
        self._decoding: list[JpegJob] = []  # the batch that a thread decodes
        self._resizing = Lock()
        self._last_error = ""

    def __call__(
        self,
        image: Image.Image,
        body: bytes,
        preprocess: Preprocess,
        on_failure: Callable[[], None] = lambda: None,
    ) -> NDArray[np.uint8] | None:
        """Return the resized pixels (h, w, 3) of *image*, whose file is *body*.

        Pillow loads at full size what the device does not; the result is None then. Calls *on_failure* if the
        device could not decode an RGB or gray JPEG.
        """
        strip = preprocess.fit == "crop" and max(image.size) > MAX_ASPECT_RATIO * min(image.size)
        if image.format == "JPEG" and image.mode in MODES and body.endswith(_END) and not strip:
            target = resized_size(image.size, preprocess)
            job = JpegJob(body, image.size, target, preprocess.interpolation)
            if self._join(job):
                if job.pixels is not None:
                    return job.pixels
                on_failure()
        image.load()
        return None

    def check_device(self, jpeg: bytes, size: tuple[int, int]) -> None:
        """Decode *jpeg* of *size*; raise `RuntimeUnavailableError` unless the pixels are in GPU memory.

        Without this, Pillow would silently decode every image if the GPU decoder could decode none.
        """
        (decoded,) = self.decode([jpeg])
        where = getattr(decoded, "buffer_kind", None)
        shape = tuple(getattr(decoded, "shape", ()))
        if where != self._library.ImageBufferKind.STRIDED_DEVICE or shape != (size[1], size[0], 3):
            result = "nothing" if decoded is None else f"{shape} in {getattr(where, 'name', where)}"
            raise RuntimeUnavailableError(
                f"decode=nvimagecodec: the GPU did not decode a test JPEG (result: {result}); "
                'run: pip install "sopdeploy[nvimagecodec]" (with nvJPEG), or serve with decode=exact'
            )

    def _join(self, job: JpegJob) -> bool:
        """Wait until *job* has run in a batch; return False if the next batch is full.

        One of the waiting threads runs the batch for all of them.
        """
        with self._changed:
            area = sum(waiting.area for waiting in self._waiting)
            full = len(self._waiting) >= LARGEST_DECODE_BATCH
            if full or (self._waiting and area + job.area > MAX_BATCH_PIXELS):
                return False
            self._waiting.append(job)
            while not job.done and (self._decoding or job not in self._waiting):
                self._changed.wait()
            if job.done:
                return True
            jobs, self._waiting = self._waiting, []
            self._decoding = jobs
        try:
            decoded = self.decode([job.body for job in jobs])
            with self._resizing:  # a third batch waits here, so two are on the device
                self._end_decoding(jobs)
                self.resize(jobs, decoded)
        except Exception as error:  # the libraries' errors share no base class
            reason = reason_of(error)
            if reason != self._last_error:  # a device that is lost fails with every batch
                log.warning("%d JPEGs are decoded on the CPU: %s", len(jobs), reason)
            self._last_error = reason
        finally:
            for ended in jobs:
                ended.done = True
            self._end_decoding(jobs)
        return True

    def _end_decoding(self, jobs: list[JpegJob]) -> None:
        """Let another thread decode the next batch, and wake the threads of *jobs*."""
        with self._changed:
            if self._decoding is jobs:
                self._decoding = []
            self._changed.notify_all()

    def decode(self, bodies: Sequence[bytes]) -> list[Any]:
        """Decode JPEGs to images of the library on the device, None for those that it cannot decode."""
        images: list[Any] = self._decoder.decode(bodies, params=self._params)
        return images

    def resize(self, jobs: Sequence[JpegJob], decoded: Sequence[Any]) -> None:
        """Resize what could be decoded of *jobs*; images of the same sizes in one run."""
        groups: dict[tuple[object, ...], list[tuple[JpegJob, Any]]] = {}
        for job, image in zip(jobs, decoded, strict=True):
            if image is not None and tuple(image.shape) == (job.size[1], job.size[0], 3):
                alone = job.area > MAX_GROUPED_PIXELS and id(job)  # a group is copied on the device
                key = (job.size, job.target, job.interpolation, alone)
                groups.setdefault(key, []).append((job, image))
        for group in groups.values():
            first, _ = group[0]
            resized = self._resize([image for _, image in group], first.target, first.interpolation)
            for (job, _), pixels in zip(group, resized, strict=True):
                job.pixels = pixels
