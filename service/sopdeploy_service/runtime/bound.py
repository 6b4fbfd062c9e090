"""An onnxruntime session on a GPU with bound tensors: memory there is kept between runs, not made anew."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEPT = 8  # batch sizes whose tensors stay on the device; the one used longest ago is given up first


@dataclass(frozen=True, slots=True)
class Tensors:
    """The input and the outputs of one batch size on the device, and their binding."""

    images: Any
    outputs: Mapping[str, Any]
    binding: Any


class BoundSession:
    """Runs *session*, of the module *engine*, on tensors of *device*, such as `cuda:0`.

    *image* is the name of the input, *outputs* are the names and the shapes (without the batch) of float32
    outputs.
    """

    def __init__(
        self,
        engine: Any,
        session: Any,
        device: str,
        image: str,
        outputs: Mapping[str, tuple[int | None, ...]],
    ) -> None:
        self._engine, self._session = engine, session
        self._kind, _, number = device.partition(":")
        self._number = int(number or 0)
        self._image, self._shapes = image, outputs
        self._kept: OrderedDict[tuple[int, ...], Tensors] = OrderedDict()

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Return every output by name, (n, ...) float32, for *images* (n, H, W, 3) uint8."""
        tensors = self._tensors(images)
        tensors.images.update_inplace(images)
        self._session.run_with_iobinding(tensors.binding)
        return {name: np.array(value.numpy()) for name, value in tensors.outputs.items()}

    def _tensors(self, images: NDArray[np.uint8]) -> Tensors:
        found = self._kept.pop(images.shape, None) or self._bound(images)
        self._kept[images.shape] = found
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found

    def _bound(self, images: NDArray[np.uint8]) -> Tensors:
        value, place = self._engine.OrtValue, (self._kind, self._number)
        binding = self._session.io_binding()
        given = value.ortvalue_from_numpy(images, *place)
        binding.bind_ortvalue_input(self._image, given)
        outputs = {
            name: value.ortvalue_from_shape_and_type((len(images), *shape), np.float32, *place)
            for name, shape in self._shapes.items()
        }
        for name, output in outputs.items():
            binding.bind_ortvalue_output(name, output)
        return Tensors(given, outputs, binding)
