"""Fast decoding: off by default, allowed only if the outputs of the network hardly change, and reported."""

import io

import numpy as np
import pytest
from fake_runtime import FakeRuntime
from PIL import Image

from sopdeploy.errors import ParityError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import EncodedImage, decode
from sopdeploy_service.images.loaders import MAX_DRIFT, check_fast_decode, synthetic_jpeg
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings

RULES = Preprocess(resize=36, crop=32)
FAST = Settings(decode="fast", threads=1)


def exact_and_fast(body):
    return [
        decode(EncodedImage(body), RULES, max_bytes=10**8, max_pixels=10**8, fast=fast).pixels.astype(int)
        for fast in (False, True)
    ]


def encode(size, kind="JPEG", mode="RGB", **options):
    file = io.BytesIO()
    with Image.open(io.BytesIO(synthetic_jpeg(size, 0))) as image:
        image.convert(mode).save(file, kind, **options)
    return file.getvalue()


ROTATED = Image.Exif()
ROTATED[0x0112] = 6


@pytest.mark.parametrize(
    ("size", "options", "same"),
    [
        ((192, 144), {}, False),
        ((1200, 900), {}, False),
        ((800, 600), {"mode": "CMYK"}, False),
        ((800, 600), {"exif": ROTATED.tobytes()}, False),
        *((size, {}, True) for size in [(142, 142), (20, 2000)]),
        ((400, 300), {"kind": "PNG"}, True),
    ],
)
def test_only_a_large_jpeg_is_decoded_to_other_pixels_which_are_close(size, options, same):
    exact, fast = exact_and_fast(encode(size, **options))
    assert fast.shape == exact.shape == (32, 32, 3)
    assert (fast == exact).all() if same else 0 < np.abs(fast - exact).mean() < 6


class Sensitive(FakeRuntime):
    """Depends only on the highest frequencies, which fast decoding removes."""

    def run(self, images):
        wide = images.astype(np.float32)
        fine = np.abs(np.diff(wide, axis=2)).mean(axis=(1, 2, 3)) * 1000
        return {"logits": np.stack([np.sin(fine + place) for place in range(7)], axis=1)}


def test_a_sensitive_network_is_rejected(bundle):
    with pytest.raises(ParityError, match=r"decode=fast changes the logits by .*serve it with decode=exact"):
        check_fast_decode(bundle, Sensitive(num_classes=7), FAST)


def test_a_server_decodes_fast_and_reports_the_drift(run_server, bundle_path, jpeg):
    found = load_model(bundle_path, FAST)
    assert (found.fast_decode.num_pictures, found.fast_decode.agreement) == (9, 1)
    assert 0 < found.fast_decode.drift < MAX_DRIFT
    with run_server(found.runtime, found.bundle, FAST, names=(), beside={"tiny": found}) as client:
        (model,) = client.get("/info").json()["models"]
        assert model["fast_decode"] == found.fast_decode.model_dump(exclude_none=True)
        body = encode((1200, 900))
        logits = found.runtime.run(exact_and_fast(body)[1][None].astype(np.uint8))["logits"][0]
        best = client.post("/v1/classify?top_k=1", content=body).json()["classes"][0]
        assert best["probability"] == pytest.approx(float(np.exp(logits).max() / np.exp(logits).sum()))
