"""CPU time of decoding: `decode=fast` compared with exact decoding, or what the host does for a GPU.

    python benchmarks/fast_decode.py --quick
    PYTHONPATH=.venv/cuda LD_LIBRARY_PATH=.venv/cuda/driver python benchmarks/fast_decode.py --gpu

The server measures the effect of `decode=fast` on the logits of a bundle when it starts (`/info`).

`--gpu` measures the steps of a JPEG that the GPU decodes, without the decoder itself, against those of
commit e91e1531, which are in the class `Before`. The second line runs them on the stand-in for CUDA (`make
cuda-stand-in`), where kernels and copies on the device take no time; copies between host and device are
copies of memory by the CPU there.
"""

import statistics
from functools import partial
from time import process_time
from types import SimpleNamespace
from typing import Any

import numpy as np
from measure import Result, compare, interleaved, make_parser, one_line_errors, report
from numpy.typing import NDArray
from onnx import TensorProto, helper

from sopdeploy.images.pixels import load_reduced, resized_size
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import EncodedImage, decode
from sopdeploy_service.images.device_resize import STREAM, DeviceResize
from sopdeploy_service.images.loaders import synthetic_jpeg
from sopdeploy_service.runtime.cuda_libraries import UPLOAD, device_copy
from sopdeploy_service.runtime.onnxruntime import CUDA, import_onnxruntime, pinned_memory, session_options
from sopdeploy_service.server.process import limit_heaps
from sopdeploy_service.settings import LARGEST_DECODE_BATCH

SIZES = ((4000, 3000), (2048, 1536), (1400, 1050), (500, 375))
PHOTO = (500, 375)
BATCH = 32
RULES = Preprocess(resize=256, crop=224)


class Before:
    """The steps of commit e91e1531: a launch chain for each image, and two copies of a batch."""

    def __init__(self, host: NDArray[np.uint8], device: Any) -> None:
        nodes = [
            helper.make_node("Unsqueeze", ["image", "batch"], ["rows"]),
            helper.make_node("Transpose", ["rows"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node(
                "Resize", ["planes", "", "", "size"], ["resized"],
                mode="linear", antialias=1, exclude_outside=1, cubic_coeff_a=-0.5,
            ),
            helper.make_node("Transpose", ["resized"], ["resized_rows"], perm=[0, 2, 3, 1]),
            helper.make_node("Squeeze", ["resized_rows", "batch"], ["pixels"]),
        ]  # fmt: skip
        inputs = [
            helper.make_tensor_value_info("image", TensorProto.UINT8, ["H", "W", 3]),
            helper.make_tensor_value_info("size", TensorProto.INT64, [4]),
        ]
        outputs = [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["h", "w", 3])]
        graph = helper.make_graph(
            nodes, "before", inputs, outputs, [helper.make_tensor("batch", TensorProto.INT64, [1], [0])]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
        onnxruntime = import_onnxruntime()
        options = session_options(onnxruntime, 1, CUDA)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        providers = [(CUDA, {"user_compute_stream": str(STREAM)})]
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
        self._host, self._device = host, device

    def resize(self, images: list[Any]) -> list[Any]:
        """Resize *images* one after the other."""
        resized = []
        for image in images:
            source = image.__cuda_array_interface__
            width, height = resized_size(source["shape"][1::-1], RULES)
            binding = self._session.io_binding()
            binding.bind_input("image", "cuda", 0, np.uint8, source["shape"], source["data"][0])
            binding.bind_cpu_input("size", np.array([1, 3, height, width]))
            binding.bind_output("pixels", "cpu")
            self._session.run_with_iobinding(binding)
            resized.append(binding.copy_outputs_to_cpu()[0])
        return resized

    def upload(self, images: list[NDArray[np.uint8]]) -> None:
        """Copy *images* to an array, to page-locked memory and to the GPU."""
        self._host[:] = np.stack(images)
        self._device.update_inplace(self._host)


def on_device(size: tuple[int, int]) -> Any:
    """Return an image of *size* in the memory of the device, as the decoder does."""
    shape = (size[1], size[0], 3)
    memory = import_onnxruntime().OrtValue.ortvalue_from_shape_and_type(shape, np.uint8, "cuda", 0)
    facts = {"shape": shape, "strides": None, "data": (memory.data_ptr(), False), "stream": STREAM}
    return SimpleNamespace(__cuda_array_interface__=facts, memory=memory)


def gpu_rows(runs: int) -> list[Result]:
    """Measure the microseconds of CPU time per image of each step, and their sum."""
    limit_heaps()  # as the server does
    resize, onnxruntime = DeviceResize(), import_onnxruntime()
    copy, value = device_copy(onnxruntime, "cuda"), onnxruntime.OrtValue
    host = value.ortvalue_from_shape_and_type(
        (BATCH, RULES.crop, RULES.crop, 3), np.uint8, memory_info=pinned_memory(onnxruntime)
    ).numpy()
    device = value.ortvalue_from_numpy(host, "cuda", 0)
    before = Before(host, device)
    images = [np.full(host.shape[1:], number, np.uint8) for number in range(BATCH)]
    photos = [on_device(PHOTO) for _ in range(LARGEST_DECODE_BATCH)]
    mixed = [on_device((PHOTO[0], PHOTO[1] - 10 * number)) for number in range(LARGEST_DECODE_BATCH)]
    resized = np.zeros((*resized_size(PHOTO, RULES)[::-1], 3), np.uint8)
    body = EncodedImage(synthetic_jpeg(PHOTO, 0))
    read = partial(decode, body, RULES, max_bytes=10**9, max_pixels=10**8, load=lambda *_: resized)

    def resize_together() -> object:
        return resize(photos, resized_size(PHOTO, RULES), RULES.interpolation)

    def resize_mixed() -> None:
        for image in mixed:
            size = resized_size(image.__cuda_array_interface__["shape"][1::-1], RULES)
            resize([image], size, RULES.interpolation)

    def upload() -> None:
        np.stack(images, out=host)
        copy(device.data_ptr(), host.ctypes.data, host.nbytes, UPLOAD)

    steps: dict[str, tuple[Any, Any, int]] = {
        "header, checks and crop": (read, read, 1),
        f"resize, {len(photos)} of one size": (resize_together, partial(before.resize, photos), len(photos)),
        f"stack and upload, {BATCH}": (upload, partial(before.upload, images), BATCH),
        f"resize, {len(mixed)} sizes": (resize_mixed, partial(before.resize, mixed), len(mixed)),
    }
    rows, total = [], [0.0, 0.0]
    for number, (case, (ours, other, count)) in enumerate(steps.items()):
        seconds = interleaved((ours, other), runs=runs, warmups=5, clock=process_time)
        spent = [1e6 * statistics.median(side) / count for side in seconds]
        total = [sum(pair) for pair in zip(total, spent, strict=True)] if number < 3 else total
        rows.append((case, spent))
    rows.append(("sum of the first three", total))
    return [
        Result(case=case, against="e91e1531", ours=ours, other=other, unit="cpu-us", runs=runs)
        for case, (ours, other) in rows
    ]


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases and runs, within a minute")
    parser.add_argument("--gpu", action="store_true", help="what the host does for a GPU that decodes")
    arguments = parser.parse_args()
    if arguments.gpu:
        with one_line_errors():
            report(gpu_rows(50 if arguments.quick else 300), as_json=arguments.json)
        return
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
