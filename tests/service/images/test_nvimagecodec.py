"""nvImageCodec on the CPU, with the calls used for a GPU: same pixels, limits and errors as Pillow."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.images import loaders
from sopdeploy_service.images.decode import EncodedImage, decode, load_exact
from sopdeploy_service.images.loaders import NvImageCodec, _gpu_loader
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings
from tests.service.images.test_fast_decode import RULES, encode

GPU = Settings(decode="nvimagecodec", threads=1)


@pytest.fixture(scope="module")
def codec():
    library = pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec is not installed")
    return NvImageCodec(library, library.NVIMGCODEC_DEVICE_CPU_ONLY, ("CPU_ONLY",))


def decode_with(load, body):
    return decode(EncodedImage(body), RULES, max_bytes=10**8, max_pixels=10**8, load=load)


@pytest.fixture
def decoded(codec, monkeypatch):
    """A list that grows with each image that the library decodes."""
    numbers, decoder = [], codec._decoder
    monkeypatch.setattr(codec, "_decoder", lambda: (numbers.append(len(numbers)), decoder())[1])
    return numbers


ROTATED = Image.Exif()
ROTATED[0x0112] = 6
READ = [
    encode((31, 17)),
    encode((300, 200), mode="L"),
    encode((300, 200), progressive=True),
    encode((300, 200), exif=ROTATED.tobytes()),
]
OTHERS = [encode((300, 200), kind="PNG"), encode((300, 200), mode="CMYK")]


@pytest.mark.parametrize(("body", "count"), [*((body, 1) for body in READ), *((body, 0) for body in OTHERS)])
def test_it_decodes_rgb_and_gray_jpegs_to_the_pixels_of_pillow(codec, decoded, body, count):
    found, expected = decode_with(codec, body), decode_with(load_exact, body)
    assert len(decoded) == count
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert found.warnings == expected.warnings


def test_loading_a_model_measures_the_drift(bundle_path, codec, decoded, monkeypatch):
    monkeypatch.setattr(loaders, "_gpu_loader", lambda: codec)
    found = load_model(bundle_path, GPU)
    assert (found.fast_decode.drift, found.fast_decode.agreement) == (0, 1)
    assert len(decoded) == found.fast_decode.pictures == 9


def test_a_server_decodes_with_it(run_server, bundle, onnx_runtime, codec, decoded, monkeypatch):
    monkeypatch.setattr(loaders, "_gpu_loader", lambda: codec)
    answers = []
    for settings in (Settings(threads=1), GPU):
        with run_server(onnx_runtime, bundle, settings) as client:
            answers.append(client.post("/v1/classify", content=encode((300, 200))).json()["classes"])
    assert answers[0] == answers[1]
    assert len(decoded) == 1


def test_a_jpeg_that_the_gpu_cannot_decode_is_decoded_by_pillow_and_counted(
    run_server, bundle, onnx_runtime, codec, monkeypatch
):
    monkeypatch.setattr(loaders, "_gpu_loader", lambda: codec)
    monkeypatch.setattr(codec, "_decoder", lambda: SimpleNamespace(decode=lambda body, params: None))
    with run_server(onnx_runtime, bundle, GPU) as client:
        assert client.post("/v1/classify", content=encode((300, 200))).status_code == 200
        assert "sopdeploy_failed_gpu_decodes_total 1.0" in client.get("/metrics").text


def test_a_decoder_that_uses_the_cpu_or_decodes_nothing_is_rejected_at_the_start(codec, monkeypatch):
    message = r"the GPU did not decode a test JPEG \(result: \(64, 96, 3\) in STRIDED_HOST\).*decode=exact"
    with pytest.raises(RuntimeUnavailableError, match=message):
        codec.check_device()  # the library's own decoder, on the CPU
    monkeypatch.setattr(codec, "_decoder", lambda: SimpleNamespace(decode=lambda body, params: None))
    with pytest.raises(RuntimeUnavailableError, match="result: nothing"):
        codec.check_device()
    library = codec._library
    kind = SimpleNamespace(buffer_kind=library.ImageBufferKind.STRIDED_DEVICE, shape=[64, 96, 3])
    monkeypatch.setattr(codec, "_decoder", lambda: SimpleNamespace(decode=lambda body, params: kind))
    codec.check_device()


def test_without_the_library_the_error_says_how_to_install_it(bundle_path, monkeypatch):
    _gpu_loader.cache_clear()
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    with pytest.raises(RuntimeUnavailableError, match=r'pip install "sopdeploy\[nvimagecodec\]"'):
        load_model(bundle_path, GPU)
