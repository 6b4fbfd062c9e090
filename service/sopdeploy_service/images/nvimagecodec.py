"""Load JPEGs in batches with NVIDIA's nvImageCodec, and resize them on the same device.

While a batch is decoded, further images become the next batch, which is decoded while the first is resized.
If the next batch is full, an image is left to Pillow: the cores decode what the device cannot.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition, Event, Lock, Thread, get_ident
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.images.pixels import resized_size
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import is_for_gpu
from sopdeploy_service.images.device_resize import DeviceResize
from sopdeploy_service.runtime.base import reason_of
from sopdeploy_service.settings import LARGEST_DECODE_BATCH

_OPTIONS = ":fancy_upsampling=1"  # chroma interpolation as in libjpeg
THREADS = 4  # of the library, for what its decoders do on the CPU
MAX_BATCH_PIXELS = 50_000_000  # 150 MB of the device, unless a single image has more; two batches are there
MAX_GROUPED_PIXELS = 1_000_000  # of an image that is resized together with others

log = logging.getLogger("sopdeploy.service")


@dataclass(eq=False, slots=True)
class JpegJob:
    """A JPEG *body* of *size* to decode and resize to *target*; sizes are (width, height).

    *on_end* is called in a thread of the decoder; then *pixels* (h, w, 3) is set, unless the device could not
    decode the image.
    """

    body: bytes
    size: tuple[int, int]
    target: tuple[int, int]
    interpolation: str
    on_end: Callable[["JpegJob"], None] = lambda job: None  # noqa: ARG005
    pixels: NDArray[np.uint8] | None = None

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
        self._decoding, self._resizing = Lock(), Lock()
        self._began: dict[int, float] = {}  # when a thread took its batch
        self._last_error = ""
        for number in range(2):  # daemons: a device that hangs cannot block an exit
            Thread(target=self._run, name=f"gpu_decoder_{number}", daemon=True).start()

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
        if is_for_gpu(image, body, preprocess):
            ended, target = Event(), resized_size(image.size, preprocess)
            job = JpegJob(body, image.size, target, preprocess.interpolation, lambda _: ended.set())
            if self.put(job):
                ended.wait()
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

    def put(self, job: JpegJob) -> bool:
        """Add *job* to the next batch; return False if that is full."""
        with self._changed:
            area = sum(waiting.area for waiting in self._waiting)
            full = len(self._waiting) >= LARGEST_DECODE_BATCH
            if full or (self._waiting and area + job.area > MAX_BATCH_PIXELS):
                return False
            self._waiting.append(job)
            self._changed.notify()
            return True

    def hangs(self, seconds: float) -> bool:
        """Return whether a batch has been on the device for more than *seconds*."""
        return any(time.monotonic() - began > seconds for began in list(self._began.values()))

    def _run(self) -> None:
        while True:
            self._run_batch()

    def _run_batch(self) -> None:
        """Wait for a batch and run it; while this thread resizes it, the other one decodes the next."""
        jobs: list[JpegJob] = []
        try:
            with self._decoding:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting)
                    jobs, self._waiting = self._waiting, []
                self._began[get_ident()] = time.monotonic()
                streams = self._read_headers(jobs)
                decoded = self.decode([*streams.values()])
            with self._resizing:
                self.resize([*streams], decoded)
        except Exception as error:  # the libraries' errors share no base class
            reason = reason_of(error)
            if reason != self._last_error:  # a device that is lost fails with every batch
                log.warning("%d JPEGs are decoded on the CPU: %s", len(jobs), reason)
            self._last_error = reason
        self._began.pop(get_ident(), None)
        for job in jobs:
            job.on_end(job)

    def _read_headers(self, jobs: Sequence[JpegJob]) -> dict[JpegJob, Any]:
        """Let the library read the headers of *jobs*; leave out those with another size than announced.

        The memory that an image needs on the device follows from this header, its limit from the announced
        size.
        """
        streams = {}
        for job in jobs:
            with suppress(RuntimeError):  # not readable
                stream = self._library.CodeStream(job.body)
                if (stream.width, stream.height) == job.size:
                    streams[job] = stream
        return streams

    def decode(self, files: Sequence[Any]) -> list[Any]:
        """Decode JPEGs, as bytes or streams of the library, to its images on the device.

        It is None for those that cannot be decoded.
        """
        images: list[Any] = self._decoder.decode(files, params=self._params)
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
