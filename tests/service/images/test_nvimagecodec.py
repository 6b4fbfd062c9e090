"""nvImageCodec's decoder for CPUs through the calls that a GPU gets: Pillow's pixels, limits and errors."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from sopdeploy.errors import ImageError, RuntimeUnavailableError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images import loaders as loading
from sopdeploy_service.images.decode import EncodedImage, decode, load_exact
from sopdeploy_service.images.fast_decode import synthetic_jpeg
from sopdeploy_service.images.loaders import NvImageCodec, _gpu_loader
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings

RULES = Preprocess(resize=36, crop=32)
GPU = Settings(decode="nvimagecodec", threads=1)


@pytest.fixture(scope="module")
def codec():
    library = pytest.importorskip("nvidia.nvimgcodec", reason="nvImageCodec is not installed")
    return NvImageCodec(library, library.NVIMGCODEC_DEVICE_CPU_ONLY, ("CPU_ONLY",))


def saved(size=(300, 200), kind="JPEG", mode="RGB", **options):
    file = io.BytesIO()
    with Image.open(io.BytesIO(synthetic_jpeg(size, 0))) as picture:
        picture.convert(mode).save(file, kind, **options)
    return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def by(load, body):
    return decode(EncodedImage(body), RULES, max_bytes=10**8, max_pixels=10**8, load=load)


class Counted:
    """The library's decoder, and how many pictures it was given."""

    def __init__(self, codec, monkeypatch):
        self.given = 0
        inner = codec._decode_pixels

        def pixels(body):
            self.given += 1
            return inner(body)

        monkeypatch.setattr(codec, "_decode_pixels", pixels)


@pytest.mark.parametrize(
    "body",
    [
        saved(),
        saved((31, 17)),
        saved(mode="L"),
        saved(progressive=True),
        saved(subsampling=0),
        *(saved(exif=turned(orientation)) for orientation in range(1, 9)),
    ],
)
def test_a_plain_jpeg_is_decoded_by_it_to_the_pixels_of_pillow(codec, monkeypatch, body):
    counted = Counted(codec, monkeypatch)
    found, wanted = by(codec, body), by(load_exact, body)
    assert counted.given == 1
    np.testing.assert_array_equal(found.pixels, wanted.pixels)
    assert found.warnings == wanted.warnings


@pytest.mark.parametrize("body", [saved(kind="PNG"), saved(mode="CMYK"), saved(kind="WEBP", lossless=True)])
def test_other_files_stay_with_pillow(codec, monkeypatch, body):
    counted = Counted(codec, monkeypatch)
    np.testing.assert_array_equal(by(codec, body).pixels, by(load_exact, body).pixels)
    assert counted.given == 0


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_a_jpeg_that_is_cut_short_is_refused_as_ever(codec, keep):
    whole = saved()
    with pytest.raises(ImageError) as refused:
        by(codec, whole[: int(len(whole) * keep)])
    assert refused.value.code == "truncated_image"


def test_a_result_of_another_shape_than_the_header_says_is_not_used(codec, monkeypatch):
    monkeypatch.setattr(codec, "_decode_pixels", lambda body: np.zeros((3, 3, 3), np.uint8))
    np.testing.assert_array_equal(by(codec, saved()).pixels, by(load_exact, saved()).pixels)


def test_a_server_with_it_measures_its_drift_before_it_answers(bundle_path, codec, monkeypatch):
    monkeypatch.setattr(loading, "_gpu_loader", lambda: codec)
    counted = Counted(codec, monkeypatch)
    found = load_model(bundle_path, GPU)
    assert (found.fast_decode.drift, found.fast_decode.agreement) == (0, 1)
    assert counted.given == found.fast_decode.pictures == 9


def test_a_request_is_answered_through_it(run_server, bundle, onnx_runtime, codec, monkeypatch):
    monkeypatch.setattr(loading, "_gpu_loader", lambda: codec)
    with run_server(onnx_runtime, bundle, Settings(threads=1)) as client:
        wanted = client.post("/v1/classify", content=saved()).json()["classes"]
    counted = Counted(codec, monkeypatch)
    with run_server(onnx_runtime, bundle, GPU) as client:
        assert client.post("/v1/classify", content=saved()).json()["classes"] == wanted
    assert counted.given == 1


class Absent:
    """A library whose device is not there."""

    CPU_ONLY = 0

    class ColorSpec:
        SRGB = 1

    def Backend(self, kind):  # noqa: N802
        return kind

    def DecodeParams(self, **options):  # noqa: N802
        return options

    def Decoder(self, **options):  # noqa: N802
        raise RuntimeError("CUDA Runtime failure: '#35'")


def test_without_a_gpu_the_server_does_not_start_and_says_why():
    with pytest.raises(RuntimeUnavailableError, match=r"no GPU that can decode.*#35.*decode=exact"):
        NvImageCodec(Absent(), 0, ("CPU_ONLY",))


def test_without_the_library_the_error_says_how_to_get_it(bundle_path, monkeypatch):
    _gpu_loader.cache_clear()
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    with pytest.raises(RuntimeUnavailableError, match=r'pip install "sopdeploy\[nvimagecodec\]"'):
        load_model(bundle_path, GPU)
