"""nvImageCodec on the CPU, with the calls used for a GPU: batches, Pillow's pixels, limits and errors."""

import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sopdeploy.errors import ParityError, RuntimeUnavailableError
from sopdeploy_service.images import loaders
from sopdeploy_service.images.decode import EncodedImage, decode, load_exact
from sopdeploy_service.images.loaders import CHECKED_SIZE, gpu_loader, synthetic_jpeg
from sopdeploy_service.images.nvimagecodec import LARGEST_DECODE_BATCH, JpegJob
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings
from tests.service.conftest import write_bundle
from tests.service.images.test_fast_decode import RULES, encode

GPU, AUTO = (Settings(decode=decode, threads=1) for decode in ("nvimagecodec", "auto"))


def decode_with(load, body, rules=RULES):
    return decode(EncodedImage(body), rules, max_bytes=10**8, max_pixels=10**8, load=load)


ROTATED = Image.Exif()
ROTATED[0x0112] = 6
READ = [
    encode((31, 17)),
    encode((300, 200), mode="L"),
    encode((300, 200), progressive=True),
    encode((300, 200), exif=ROTATED.tobytes()),
]
OTHERS = [
    encode((300, 200), kind="PNG"),
    encode((300, 200), mode="CMYK"),
    encode((20, 2000)),  # of a strip, Pillow resizes only what the network sees
    READ[0] + b"data after the end",
]


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("body", READ, ids=["RGB", "gray", "progressive", "rotated"])
def test_rgb_and_gray_jpegs_get_the_pixels_of_pillow_within_a_gray_level(codec, body, fit):
    rules = RULES.model_copy(update={"fit": fit})
    found, expected = decode_with(codec, body, rules), decode_with(load_exact, body, rules)
    assert codec._decoder.batches == [1]
    assert np.abs(found.pixels.astype(int) - expected.pixels).max() <= 1
    assert (found.warnings, found.size) == (expected.warnings, expected.size)


@pytest.mark.parametrize("body", OTHERS, ids=["PNG", "CMYK", "strip", "data after the end"])
def test_pillow_decodes_other_images(codec, body):
    np.testing.assert_array_equal(decode_with(codec, body).pixels, decode_with(load_exact, body).pixels)
    assert codec._decoder.batches == []


def test_images_that_wait_become_one_batch_and_further_ones_are_left_to_pillow(codec):
    decoder, bodies = codec._decoder, [encode((300 + number, 200)) for number in range(20)]
    decoder.open.clear()
    with ThreadPoolExecutor(len(bodies)) as pool:
        found = [pool.submit(decode_with, codec, bodies[0])]
        while not decoder.batches:
            threading.Event().wait(0.001)
        found += [pool.submit(decode_with, codec, body) for body in bodies[1:]]
        while sum(future.done() for future in found) < len(bodies) - 1 - LARGEST_DECODE_BATCH:
            threading.Event().wait(0.001)
        decoder.open.set()
    assert decoder.batches == [1, LARGEST_DECODE_BATCH]
    for body, future in zip(bodies, found, strict=True):
        expected = decode_with(load_exact, body).pixels
        assert np.abs(future.result().pixels.astype(int) - expected).max() <= 1


def test_large_images_do_not_share_a_batch(codec, monkeypatch):
    monkeypatch.setattr("sopdeploy_service.images.nvimagecodec.MAX_BATCH_PIXELS", 70_000)
    codec._decoder.open.clear()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(decode_with, codec, READ[0])
        while not codec._decoder.batches:
            threading.Event().wait(0.001)
        others = [pool.submit(decode_with, codec, encode((300, 200))) for _ in range(2)]
        while not any(future.done() for future in others):  # the second of them
            threading.Event().wait(0.001)
        codec._decoder.open.set()
    assert codec._decoder.batches == [1, 1]
    assert first.result().size == (31, 17)


def test_a_batch_of_mixed_sizes_gets_the_pixels_of_single_images_one_run_for_each_size(codec):
    bodies = [encode(size) for size in ((300, 200), (31, 17), (300, 200), (200, 300), (31, 17), (300, 200))]
    alone = [decode_with(codec, body).pixels for body in bodies]
    resize, runs, decoder = codec._resize, [], codec._decoder

    def counted(images, *rules):
        runs.append(len(images))
        return resize(images, *rules)

    codec._resize = counted
    decoder.open.clear()
    with ThreadPoolExecutor(len(bodies) + 1) as pool:
        found = [pool.submit(decode_with, codec, READ[0])]
        while len(decoder.batches) <= len(bodies):  # of the single images, and one that blocks
            threading.Event().wait(0.001)
        for number, body in enumerate(bodies, 1):
            found.append(pool.submit(decode_with, codec, body))
            while len(codec._waiting) < number:
                threading.Event().wait(0.001)
        decoder.open.set()
    assert decoder.batches[-1] == len(bodies)
    assert runs == [1, 3, 2, 1]
    for future, expected in zip(found[1:], alone, strict=True):
        np.testing.assert_array_equal(future.result().pixels, expected)


def test_the_next_batch_is_decoded_while_one_is_resized_and_a_third_one_waits(codec):
    resize, gate, decoder, entered = codec._resize, threading.Semaphore(0), codec._decoder, []

    def gated(*given):
        entered.append(None)
        assert gate.acquire(timeout=60)
        return resize(*given)

    codec._resize = gated
    with ThreadPoolExecutor(3) as pool:
        found = []
        for number in (1, 2):  # batch 1 is resized, 2 decoded
            found.append(pool.submit(decode_with, codec, READ[0]))
            while len(decoder.batches) < number or not entered:
                threading.Event().wait(0.001)
        found.append(pool.submit(decode_with, codec, READ[0]))
        while not codec._waiting:
            threading.Event().wait(0.001)
        assert decoder.batches == [1, 1]
        gate.release(3)
    assert decoder.batches == [1, 1, 1]
    for future in found:
        np.testing.assert_array_equal(future.result().pixels, found[0].result().pixels)


def broken(*_):
    raise RuntimeError("CUDA error 719")


@pytest.mark.parametrize(("fail", "lines"), [(lambda bodies: [None] * len(bodies), 0), (broken, 1)])
def test_jpegs_that_the_gpu_cannot_decode_are_decoded_by_pillow_counted_and_logged_once(
    run_server, bundle, onnx_runtime, codec, fail, lines, caplog
):
    codec._decoder.fail = fail
    with run_server(onnx_runtime, bundle, GPU) as client:
        for _ in range(2):
            assert client.post("/v1/classify", content=encode((300, 200))).status_code == 200
        assert "sopdeploy_failed_gpu_decodes_total 2.0" in client.get("/metrics").text
    assert caplog.messages.count("1 JPEGs are decoded on the CPU: CUDA error 719") == lines


DAMAGED = """
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.images.loaders import gpu_loader
try:
    gpu_loader()
except RuntimeUnavailableError:
    pass
from nvidia import nvimgcodec
decoder = nvimgcodec.Decoder(
    device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)]
)
print(decoder.decode([bytes.fromhex("ffd8ffd9")]))
"""


def test_a_damaged_jpeg_writes_nothing_to_the_log(library):
    found = subprocess.run([sys.executable, "-c", DAMAGED], capture_output=True, text=True, check=True)
    assert found.stdout == "[None]\n"
    assert "[ERROR]" not in found.stderr
    assert "[WARNING]" not in found.stderr


def test_a_server_decodes_with_it(run_server, bundle, onnx_runtime, codec):
    with run_server(onnx_runtime, bundle, GPU) as client:
        assert client.post("/v1/classify", content=encode((300, 200))).status_code == 200
        metrics = client.get("/metrics").text
    assert "sopdeploy_failed_gpu_decodes_total 0.0" in metrics
    assert "sopdeploy_decoders 34.0" in metrics  # two batches wait for the GPU
    assert codec._decoder.batches == [1]


@pytest.mark.parametrize("settings", [GPU, AUTO])
def test_the_difference_from_exact_decoding_is_measured_and_shown(run_server, tmp_path, codec, settings):
    found = load_model(write_bundle(tmp_path, golden=True), settings)
    measured = found.fast_decode
    assert found.decode == "nvimagecodec"
    assert measured.drift < 0.02
    assert measured.agreement == 1
    assert 0 < measured.gray_levels < 0.1
    with run_server(found.runtime, found.bundle, settings, names=(), beside={"tiny": found}) as client:
        (model,) = client.get("/info").json()["models"]
        metrics = client.get("/metrics").text
    assert model["decode"] == "nvimagecodec"
    assert (model["fast_decode"]["gray_levels"], model["fast_decode"]["max_gray_levels"]) == (
        measured.gray_levels,
        1,
    )
    assert f'sopdeploy_gray_levels{{model="tiny"}} {measured.gray_levels}' in metrics
    assert 'decode="nvimagecodec"' in metrics


# What fails, and how the message ends.
FAULTS = {
    "the pixels": r"golden example differ by .* gray levels on average \(at most 1\); .* decode=exact",
    "the JPEGs": r"the GPU could not decode 12 of the JPEGs of the check; serve with decode=exact",
    "the library": r'pip install "sopdeploy\[nvimagecodec\]"',
    "CUDA": r'pip install "sopdeploy\[gpu\]" without \[cpu\], or serve with decode=exact',
    "the device": r"no GPU that can decode \(CUDA error 719\); serve with decode=exact",
    "the golden examples": r"no golden examples to check the pixels; export it again",
}


@pytest.fixture
def faulty(request, tmp_path, library, monkeypatch):
    """A bundle, and a decoder in which the fault of the test exists."""
    fault = request.param
    if fault in {"the pixels", "the JPEGs", "the golden examples"}:
        codec = request.getfixturevalue("codec")
        resize = codec._resize
        if fault == "the pixels":
            monkeypatch.setattr(codec, "_resize", lambda *given: np.roll(resize(*given), 1, axis=2))
        elif fault == "the JPEGs":
            monkeypatch.setattr(codec, "_resize", broken)
    else:
        gpu_loader.cache_clear()
        if fault == "the library":
            monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
        elif fault == "the device":  # the tests have onnxruntime without CUDA
            monkeypatch.setattr(loaders, "DeviceResize", broken)
    return fault, write_bundle(tmp_path, golden=fault != "the golden examples")


@pytest.mark.parametrize("faulty", FAULTS, indirect=True)
def test_a_model_that_the_gpu_cannot_decode_for_is_rejected_or_with_auto_decoded_exactly(faulty, caplog):
    fault, path = faulty
    if fault != "the golden examples":  # without auto, they are checked if there are any
        with pytest.raises((ParityError, RuntimeUnavailableError), match=FAULTS[fault]):
            load_model(path, GPU)
    with caplog.at_level("INFO"):
        found = load_model(path, AUTO)
    assert (found.decode, found.fast_decode) == ("exact", None)
    (line,) = (record.message for record in caplog.records if "decode=auto" in record.message)
    assert re.search(rf"tiny-\w+: decode=auto is exact: .*{FAULTS[fault]}$", line)


def test_a_decoder_that_uses_the_cpu_or_decodes_nothing_is_rejected_at_the_start(codec, library):
    jpeg = synthetic_jpeg(CHECKED_SIZE, 0)
    message = r"the GPU did not decode a test JPEG \(result: \(64, 96, 3\) in STRIDED_HOST\).*decode=exact"
    with pytest.raises(RuntimeUnavailableError, match=message):
        codec.check_device(jpeg, CHECKED_SIZE)  # the library's own decoder, on the CPU
    codec._decoder.fail = lambda bodies: [None]
    with pytest.raises(RuntimeUnavailableError, match="result: nothing"):
        codec.check_device(jpeg, CHECKED_SIZE)
    kind = SimpleNamespace(buffer_kind=library.ImageBufferKind.STRIDED_DEVICE, shape=[64, 96, 3])
    codec._decoder.fail = lambda bodies: [kind]
    codec.check_device(jpeg, CHECKED_SIZE)


def test_the_gpu_gets_no_jpeg_of_another_size_than_was_announced(codec):
    jobs = [
        JpegJob(body, (300, 200), (54, 36), "bilinear")
        for body in (encode((3000, 2000)), b"\xff\xd8", READ[1])
    ]
    ended = threading.Semaphore(0)
    for job in jobs:
        job.on_end = lambda _: ended.release()
        assert codec.put(job)
    for _ in jobs:
        assert ended.acquire(timeout=60)
    assert sum(codec._decoder.batches) == 1
    assert [job.pixels is not None for job in jobs] == [False, False, True]
