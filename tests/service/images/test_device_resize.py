"""Resizing on the device, with the CPU as the device: the same operator, memory addresses instead of copies.

`python -m tests.service.images.test_device_resize` writes the graphs.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from sopdeploy.images.pixels import RESAMPLING
from sopdeploy_service.images import device_resize
from sopdeploy_service.images.device_resize import FILTERS, DeviceResize
from sopdeploy_service.runtime.onnxruntime import CPU
from tests.cuda.stand_in import ABSENT, installed, opened, start

FOLDER = Path(device_resize.__file__).parent
MODES = {"bilinear": "linear", "bicubic": "cubic"}
SIZES = [  # of the file, of the resized image
    ((500, 375), (341, 256)),
    ((1000, 700), (366, 256)),
    ((192, 256), (256, 341)),
    ((390, 263), (379, 256)),
    ((40, 30), (40, 30)),
    ((7, 5), (2, 1)),
]


def build(interpolation: str) -> onnx.ModelProto:
    """Build the graph: images (n, H, W, 3) and size (n, 3, h, w) to pixels (n, h, w, 3)."""
    nodes = [
        helper.make_node("Transpose", ["images"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node(
            "Resize",
            ["planes", "", "", "size"],
            ["resized"],
            mode=MODES[interpolation],
            antialias=1,
            exclude_outside=1,  # Pillow cuts the filter at the edges
            cubic_coeff_a=-0.5,
        ),
        helper.make_node("Transpose", ["resized"], ["pixels"], perm=[0, 2, 3, 1]),
    ]
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", "H", "W", 3]),
        helper.make_tensor_value_info("size", TensorProto.INT64, [4]),
    ]
    outputs = [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", "h", "w", 3])]
    graph = helper.make_graph(nodes, interpolation, inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


@pytest.fixture(scope="module")
def resize() -> DeviceResize:
    return DeviceResize(CPU)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("size", "target"), SIZES)
def test_pixels_are_at_most_one_gray_level_from_those_of_pillow(
    resize: DeviceResize, interpolation: str, size: tuple[int, int], target: tuple[int, int]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(noise).resize(target, RESAMPLING[interpolation]))
    difference = np.abs(resize([noise], target, interpolation)[0].astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("interpolation", FILTERS)
def test_images_of_a_batch_get_the_pixels_they_get_alone(resize: DeviceResize, interpolation: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 37, 50, 3), dtype=np.uint8)
    together = resize(list(images), (34, 25), interpolation)
    for image, found in zip(images, together, strict=True):
        np.testing.assert_array_equal(found, resize([image], (34, 25), interpolation)[0])


def test_memory_is_reused_only_when_no_view_of_the_pixels_exists() -> None:
    resize = DeviceResize(CPU)
    images = list(np.random.default_rng(0).integers(0, 256, (3, 37, 50, 3), dtype=np.uint8))
    kept = resize(images, (34, 25), "bilinear")[1][2:]
    before, address = kept.copy(), kept.ctypes.data
    for _ in range(2):
        assert abs(resize(images[::-1], (34, 25), "bilinear").ctypes.data - address) > kept.nbytes
    np.testing.assert_array_equal(kept, before)
    assert len(resize._blocks) == 1
    del kept
    assert len(resize._blocks) == 2
    resize(images, (40, 30), "bilinear")  # larger than any block


@pytest.mark.parametrize("interpolation", FILTERS)
def test_the_graph_is_what_its_source_builds(interpolation: str) -> None:
    stored = (FOLDER / f"{interpolation}.onnx").read_bytes()
    assert stored == build(interpolation).SerializeToString()


@pytest.mark.skipif(not installed(), reason=ABSENT)
@pytest.mark.parametrize("interpolation", FILTERS)
def test_the_cuda_provider_runs_every_operator(interpolation: str) -> None:
    assert opened(build(interpolation)) == "ok"


ON_CUDA = """
import ctypes, sys
from types import SimpleNamespace
import numpy as np
from sopdeploy_service.images.device_resize import DeviceResize
from tests.cuda.stand_in import runtime_library
pixels = np.zeros((5, 7, 3), np.uint8)
facts = {"shape": pixels.shape, "strides": None, "data": (pixels.ctypes.data, False)}
facts["stream"] = eval(sys.argv[1])
resize, cudart = DeviceResize(), ctypes.CDLL(runtime_library())
cudart.stand_in_streams()
try:
    print(resize([SimpleNamespace(__cuda_array_interface__=facts)] * 2, (4, 3), "bicubic").shape, end=" ")
except ValueError as error:
    print(error, end=" ")
print(bin(cudart.stand_in_streams()))
"""


@pytest.mark.skipif(not installed(), reason=ABSENT)
@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        ("1", "(2, 3, 4, 3) 0b10"),  # only the legacy default stream was used
        ("None", "(2, 3, 4, 3) 0b10"),
        ("2", "a decoded image is complete on stream 2, not on 1 0b0"),
    ],
)
def test_the_cuda_provider_reads_the_memory_of_the_decoder_on_its_stream(stream: str, expected: str) -> None:
    assert start("-c", ON_CUDA, stream).communicate(timeout=120)[0] == f"{expected}\n"


if __name__ == "__main__":
    for name in FILTERS:
        (FOLDER / f"{name}.onnx").write_bytes(build(name).SerializeToString())
