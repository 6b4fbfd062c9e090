"""nvImageCodec on the CPU, with the calls used for a GPU: same pixels, limits and errors as Pillow."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sopdeploy.errors import ImageError, RuntimeUnavailableError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images import loaders as loading
from sopdeploy_service.images.decode import EncodedImage, decode, load_exact
from sopdeploy_service.images.loaders import NvImageCodec, _gpu_loader, synthetic_jpeg
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings

RULES = Preprocess(resize=36, crop=32)
GPU = Settings(decode="nvimagecodec", threads=1)


@pytest.fixture(scope="module")
def codec():
    library = pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec is not installed")
    return NvImageCodec(library, library.NVIMGCODEC_DEVICE_CPU_ONLY, ("CPU_ONLY",))


def encode(size=(300, 200), kind="JPEG", mode="RGB", **options):
    file = io.BytesIO()
    with Image.open(io.BytesIO(synthetic_jpeg(size, 0))) as image:
        image.convert(mode).save(file, kind, **options)
    return file.getvalue()


def exif_with(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def decode_with(load, body):
    return decode(EncodedImage(body), RULES, max_bytes=10**8, max_pixels=10**8, load=load)


class Counter:
    """Counts the images that the library decodes."""

    def __init__(self, codec, monkeypatch):
        self.count = 0
        decoder = codec._decoder

        def counted():
            self.count += 1
            return decoder()

        monkeypatch.setattr(codec, "_decoder", counted)


@pytest.mark.parametrize(
    "body",
    [
        encode(),
        encode((31, 17)),
        encode(mode="L"),
        encode(progressive=True),
        encode(subsampling=0),
        *(encode(exif=exif_with(orientation)) for orientation in range(1, 9)),
    ],
)
def test_rgb_and_gray_jpegs_have_the_pixels_of_pillow(codec, monkeypatch, body):
    counter = Counter(codec, monkeypatch)
    found, expected = decode_with(codec, body), decode_with(load_exact, body)
    assert counter.count == 1
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert found.warnings == expected.warnings


@pytest.mark.parametrize("body", [encode(kind="PNG"), encode(mode="CMYK"), encode(kind="WEBP")])
def test_pillow_decodes_other_files(codec, monkeypatch, body):
    counter = Counter(codec, monkeypatch)
    np.testing.assert_array_equal(decode_with(codec, body).pixels, decode_with(load_exact, body).pixels)
    assert counter.count == 0


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_a_truncated_jpeg_is_rejected(codec, keep):
    complete = encode()
    with pytest.raises(ImageError) as caught:
        decode_with(codec, complete[: int(len(complete) * keep)])
    assert caught.value.code == "truncated_image"


def test_a_result_with_another_shape_than_the_header_is_not_used(codec, monkeypatch):
    pixels = SimpleNamespace(cpu=lambda: np.zeros((3, 3, 3), np.uint8))
    other = SimpleNamespace(decode=lambda body, params: pixels)
    monkeypatch.setattr(codec, "_decoder", lambda: other)
    np.testing.assert_array_equal(
        decode_with(codec, encode()).pixels, decode_with(load_exact, encode()).pixels
    )


def test_loading_a_model_measures_the_drift(bundle_path, codec, monkeypatch):
    monkeypatch.setattr(loading, "_gpu_loader", lambda: codec)
    counter = Counter(codec, monkeypatch)
    found = load_model(bundle_path, GPU)
    assert (found.fast_decode.drift, found.fast_decode.agreement) == (0, 1)
    assert counter.count == found.fast_decode.pictures == 9


def test_a_server_decodes_with_it(run_server, bundle, onnx_runtime, codec, monkeypatch):
    monkeypatch.setattr(loading, "_gpu_loader", lambda: codec)
    with run_server(onnx_runtime, bundle, Settings(threads=1)) as client:
        expected = client.post("/v1/classify", content=encode()).json()["classes"]
    counter = Counter(codec, monkeypatch)
    with run_server(onnx_runtime, bundle, GPU) as client:
        assert client.post("/v1/classify", content=encode()).json()["classes"] == expected
    assert counter.count == 1


class NoDevice:
    """A library without a device."""

    CPU_ONLY = 0

    class ColorSpec:
        SRGB = 1

    def Backend(self, kind):  # noqa: N802
        return kind

    def DecodeParams(self, **options):  # noqa: N802
        return options

    def Decoder(self, **options):  # noqa: N802
        raise RuntimeError("CUDA Runtime failure: '#35'")


def test_without_a_gpu_an_error_explains_what_to_do():
    with pytest.raises(RuntimeUnavailableError, match=r"no GPU that can decode.*#35.*decode=exact"):
        NvImageCodec(NoDevice(), 0, ("CPU_ONLY",))


def test_without_the_library_the_error_says_how_to_install_it(bundle_path, monkeypatch):
    _gpu_loader.cache_clear()
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    with pytest.raises(RuntimeUnavailableError, match=r'pip install "sopdeploy\[nvimagecodec\]"'):
        load_model(bundle_path, GPU)
