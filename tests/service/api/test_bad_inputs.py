"""Images, forms, JSON bodies of `/v1/classify`, paths and methods: each mistake has a status and a code."""

import base64
import gzip
import re
import struct

import orjson
import pytest
from PIL import Image

from sopdeploy.errors import ImageError
from sopdeploy.images.decode import decode
from sopdeploy.images.limits import FORMATS
from sopdeploy_service.api.admission import parse_upload
from sopdeploy_service.http.forms import parse_form
from sopdeploy_service.http.strict_json import decode_text
from sopdeploy_service.inference import decoders
from sopdeploy_service.inference.results import RejectedError
from sopdeploy_service.settings import Settings
from tests.support.fake_runtime import FakeRuntime
from tests.support.pictures import encoded, png
from tests.support.raw import connect, read
from tests.support.service import RULES, picture_bytes

JPEG_IMAGE = picture_bytes()


def jpeg_of_size(width: int, height: int) -> bytes:
    """The JPEG with another size in its frame header."""
    frame = JPEG_IMAGE.index(b"\xff\xc0")
    return JPEG_IMAGE[: frame + 5] + struct.pack(">HH", height, width) + JPEG_IMAGE[frame + 9 :]


def saved(kind: str, **options: object) -> bytes:
    return encoded(Image.new("RGB", (40, 40), (200, 30, 60)), kind, **options)


def with_other_size(kind: str, width: int, height: int) -> bytes:
    """A HEIC or AVIF file of 40 x 40 pixels whose header says another size."""
    size = b"ispe" + struct.pack(">III", 0, width, height)
    return re.sub(rb"ispe.{12}", lambda _found: size, saved(kind), flags=re.DOTALL)


BAD_BODIES = {
    (400, "empty_body"): {"empty body": b""},
    (413, "too_large"): {
        "one byte over the limit": JPEG_IMAGE + bytes(1_000_001 - len(JPEG_IMAGE))
    },
    (413, "too_many_pixels"): {
        "PNG of 900 megapixels": png(30_000, 30_000),
        "HEIC of 71 megapixels": with_other_size("HEIF", 8900, 8000),
        "AVIF of 71 megapixels": with_other_size("AVIF", 8900, 8000),
    },
    (415, "not_an_image"): {
        "text": b"hello, I am a cat",
        "text that begins as a BMP": b"BMW is a car",
        "JSON": b'{"image": "aGVsbG8="}',
        "a sound": b"RIFF\0\0\0\0WAVEfmt " + bytes(100),
        "PPM": saved("PPM"),
        "gzip": gzip.compress(JPEG_IMAGE),
    },
    (415, "unsupported_format"): {
        "a web page": b"\n<!DOCTYPE html><html>",
        "TIFF": saved("TIFF"),
        "JPEG 2000": b"\0\0\0\x0cjP  " + bytes(100),
        "JPEG XL": b"\0\0\0\x0cJXL " + bytes(100),
        "ICO": saved("ICO"),
        "PDF": b"%PDF-1.7 ...",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    },
    (422, "truncated_image"): {
        "JPEG cut in half": JPEG_IMAGE[: len(JPEG_IMAGE) // 2],
        "PNG cut in its pixels": picture_bytes(kind="PNG")[:-60],
        "AVIF cut in its pixels": saved("AVIF")[:-30],
    },
    (422, "damaged_image"): {
        "JPEG without a width": jpeg_of_size(0, 10),
        "only the signature of a HEIC": b"\0\0\0\x18ftypheic" + bytes(100),
        "only the signature of an AVIF": b"\0\0\0\x1cftypavif" + bytes(100),
    },
    (422, None): {
        "20 bytes of JPEG": JPEG_IMAGE[:20],
        "PNG without a width": png(0, 10),
        "PNG without its pixels": png(500, 500, depth=8),
        "PNG with 20000 broken chunks": png(8, 8, extra=b"\0\0\0\0TEXT\0\0\0\0" * 20_000),
        "PNG with a broken checksum": saved("PNG")[:29] + b"oops" + saved("PNG")[33:],
        "GIF without a width": b"GIF89a" + bytes(100),
    },
}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(body, key, id=name)
        for key, bodies in BAD_BODIES.items()
        for name, body in bodies.items()
    ],
)
def test_a_bad_image_has_its_own_code(body, expected):
    with pytest.raises(ImageError) as caught:
        decode(body, RULES, max_bytes=1_000_000, max_pixels=Settings().max_pixels)
    assert caught.value.status == expected[0]
    assert expected[1] in (None, caught.value.code)


@pytest.mark.parametrize("kind", ["ICO", "EPS", "JPEG2000", "TGA", "TIFF", "PPM"])
def test_an_unsupported_format_never_reaches_pillow(kind, monkeypatch):
    body = saved(kind)
    monkeypatch.setattr(Image, "open", lambda *given, **options: pytest.fail("was opened"))

    with pytest.raises(ImageError) as caught:
        decode(body, RULES, max_bytes=1_000_000, max_pixels=1_000_000)
    assert caught.value.status == 415


def test_every_accepted_format_is_classified_whatever_its_media_type(client):
    for kind in FORMATS.values():
        for media_type in ("image/x-ms-bmp", "image/png", "application/json"):
            reply = client.post(
                "/v1/classify", content=saved(kind), headers={"Content-Type": media_type}
            )
            assert (reply.status_code, reply.json()["warnings"]) == (200, []), (
                kind,
                media_type,
            )


FORM = "multipart/form-data"
GZIP = {"Content-Encoding": "gzip"}
PART = b'--XX\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
NAMELESS = b"--XX\r\nContent-Type: image/png\r\n\r\nx\r\n--XX--\r\n"


def text_part(name: str, text: str) -> bytes:
    """Write a text field of a form."""
    head = f'--XX\r\nContent-Disposition: form-data; name="{name}"'
    return f"{head}\r\n\r\n{text}\r\n".encode()


BAD_FORMS = {
    "no form": (b"hello", 400, "malformed_multipart"),
    "empty body": (b"", 400, "malformed_multipart"),
    "no part": (b"--XX--\r\n", 422, "no_image"),
    "another delimiter": (b"--YY\r\n" + PART[6:], 400, "malformed_multipart"),
    "cut in a part": (PART + b"\xff\xd8\xff", 400, "malformed_multipart"),
    "cut after a part": (PART + b"x\r\n--XX", 400, "malformed_multipart"),
    "part without a name": (NAMELESS, 422, "no_image"),
    "a name instead of a file": (
        text_part("image", "photo.jpg") + b"--XX--\r\n",
        422,
        "no_image",
    ),
    "a parameter that is not a number": (
        text_part("top_k", "many") + PART + b"x\r\n--XX--\r\n",
        422,
        "invalid_parameter",
    ),
    "another model": (
        text_part("model", "other") + PART + b"x\r\n--XX--\r\n",
        400,
        "malformed_request",
    ),
    "too many texts": (text_part("a", "") * 201 + b"--XX--\r\n", 400, "malformed_multipart"),
    "empty image": (PART + b"\r\n--XX--\r\n", 400, "empty_body"),
    "9 images of 8": ((PART + b"x\r\n") * 9 + b"--XX--\r\n", 400, "too_many_images"),
}
BAD_REQUESTS = {
    **{
        name: ({"Content-Type": f"{FORM}; boundary=XX"}, *rest)
        for name, rest in BAD_FORMS.items()
    },
    "no boundary": ({"Content-Type": FORM}, b"x", 400, "malformed_multipart"),
    "huge boundary": (
        {"Content-Type": f"{FORM}; boundary={'X' * 1000}"},
        b"x",
        400,
        "malformed_multipart",
    ),
    "mixed": (
        {"Content-Type": "multipart/mixed; boundary=XX"},
        b"--XX--",
        415,
        "unsupported_multipart",
    ),
    "gzip": (GZIP, b"\x1f\x8b", 415, "unsupported_encoding"),
    "a form in gzip": (
        {**GZIP, "Content-Type": f"{FORM}; boundary=x"},
        b"x",
        415,
        "unsupported_encoding",
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_rejected_and_the_next_request_succeeds(client, jpeg, name):
    headers, body, status, code = BAD_REQUESTS[name]
    reply = client.post("/v1/classify", content=body, headers=headers)

    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert client.post("/v1/classify", content=jpeg).status_code == 200


FILE_PART = b'--XX\r\nContent-Disposition: form-data; name="%b"; filename="%b"\r\n\r\n%b\r\n'
PHOTO = picture_bytes()
# Parts of a form with a photograph, as upload widgets and browsers send them
FORMS = {
    "a name of PHP": FILE_PART % (b"files[]", b"a.jpg", PHOTO),
    "a token": text_part("csrf", "abc") + FILE_PART % (b"image", b"a.jpg", PHOTO),
    "metadata under the same name": text_part("image", "{}")
    + FILE_PART % (b"image", b"a.jpg", PHOTO),
    "an input without a file": FILE_PART % (b"image", b"a.jpg", PHOTO)
    + FILE_PART % (b"other", b"", b""),
    "no file name": text_part("image", "")[:-2] + PHOTO + b"\r\n",
    "a long text": text_part("comment", "a" * 5000) + FILE_PART % (b"photo", b"a", PHOTO),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_files_of_a_form_are_images_and_its_texts_options(client, name):
    headers = {"Content-Type": f"{FORM}; boundary=XX"}
    content = FORMS[name] + text_part("top_k", "2") + b"--XX--\r\n"
    for query, num_classes in (("", 2), ("?top_k=3", 3)):
        reply = client.post(f"/v1/classify{query}", content=content, headers=headers)
        assert (reply.status_code, len(reply.json()["classes"])) == (200, num_classes)


def test_what_others_add_to_an_address_is_left_out(client, jpeg):
    for query in ("_=1732752000", "utm_source=x&utm_medium=y", "api-version=2024-01-01"):
        assert client.post(f"/v1/classify?{query}", content=jpeg).status_code == 200
    for coding in ("", "identity", "UTF-8"):
        headers = {"Content-Encoding": coding}
        assert client.post("/v1/classify", content=jpeg, headers=headers).status_code == 200


def test_a_large_body_without_a_length_is_rejected_while_it_arrives(client, jpeg):
    reply = client.post("/v1/classify", content=iter([bytes(65_536)] * 400))

    assert (reply.status_code, reply.json()["code"]) == (413, "too_large")
    assert reply.headers["connection"] == "close"
    assert client.post("/v1/classify", content=jpeg).status_code == 200


@pytest.mark.parametrize(
    ("content_type", "is_of_several"),
    [
        ("multipart/form-data; boundary=XX", True),
        ("application/json", True),
        ("image/jpeg", False),
    ],
)
def test_a_body_that_is_too_large_is_named_as_what_it_is(client, content_type, is_of_several):
    headers = {"Content-Type": content_type}
    body = bytes(20_000_001)
    reply = client.post("/v1/classify", content=body, headers=headers).json()

    assert (reply["status"], reply["code"]) == (413, "too_large")
    assert ("images" in reply["detail"]) is is_of_several


OTHER_PATHS = (
    *(
        "POST /v1/classify/",
        "POST //v1/classify",
        "POST /v1/x/../classify",
        "POST /v1/classify%00",
    ),
    *("GET /..%2f..%2f..%2fetc/passwd", "GET /%ff%fe"),
)
# Status, and what the detail names
BAD_LINES = {
    "GET /v1/classify": (405, "POST"),
    "POST /": (405, "/v1/classify"),
    "POST /livez": (405, "GET, HEAD"),
    "OPTIONS /v1/classify": (405, "POST"),
    "POST /classify": (404, "/v1/classify"),
    **dict.fromkeys(
        (
            "POST /predict",
            "POST /v1/predict",
            "POST /v1/invocations",
            "POST /v1/models/a:predict",
            "POST /predictions/a",
        ),
        (404, "/v1/classify"),
    ),
    "GET /nowhere": (404, "/docs"),
    **dict.fromkeys(OTHER_PATHS, (404, "/docs")),
}


def test_a_bad_method_or_path_is_rejected_with_advice_and_never_redirected(client):
    for line, (status, detail) in BAD_LINES.items():
        with connect(client) as wire:
            wire.sendall(f"{line} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            reply = read(wire, to_the_end=False)
        code = {404: "not_found", 405: "method_not_allowed"}[status]

        assert (reply.status, reply.code) == (status, code), line
        assert "location" not in reply.headers, line
        assert detail in orjson.loads(reply.body)["detail"]


def test_an_image_that_curl_sent_without_line_breaks_names_the_option(client, jpeg):
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    for body in (jpeg.translate(None, b"\0\r\n"), b"photo.jpg"):
        reply = client.post("/v1/classify", content=body, headers=headers)
        assert (reply.status_code, reply.json()["code"]) == (400, "stripped_body")
        assert "--data-binary @FILE" in reply.json()["detail"]


BAD_TEXTS = [
    "abc$",
    "a",
    "YQ==YQ==",
    "YQ===",
    "é",
    "data:image/png,abc",
    "data:image/png;base64",
    "YR=\0=",
    "https://shop.example/a.jpg",
]


@pytest.mark.parametrize("text", [*BAD_TEXTS, 5, None], ids=repr)
def test_invalid_base64_is_rejected_with_its_place(text):
    with pytest.raises(RejectedError) as caught:
        decode_text(text, "images[3]")

    reason = caught.value.reason
    assert reason.status == 400
    assert reason.code == ("bad_base64" if isinstance(text, str) else "malformed_request")
    assert reason.message.startswith("images[3]: ")


MALFORMED = [
    ["YQ=="], {}, {"image": None}, {"image": "YQ==", "topk": 1}, {"image": "YQ==", "images": ["YQ=="]},
    {"images": "YQ=="}, {"images": [["YQ=="]]}, {"url": "https://a.example/b"},
    {"image": "YQ==", "top_k": 2},
]  # fmt: skip
BAD_JSON = [
    *((value, 400, "malformed_request") for value in MALFORMED),
    ({"images": []}, 422, "no_image"),
    ({"images": ["YQ=="] * 4}, 400, "too_many_images"),
    ({"image": "$"}, 400, "bad_base64"),
    (b'{"image": "YQ==', 400, "malformed_json"),
    (b"[" * 9000, 400, "malformed_json"),
    *(
        (b'{"images": [], "x": ' + b"[" * n + b"]" * n + b"}", 400, "malformed_json")
        for n in (254, 500, 1022)
    ),
    *(
        (b'{"images": [%b]}' % number, 400, "malformed_json")
        for number in (b"NaN", b"-Infinity", b"1e999")
    ),
    ({"images": ["YQ=="] * 1000 + [0] * 1000}, 400, "malformed_request"),
    ({"image": "A" * 10_000}, 413, "json_too_large"),
]


@pytest.mark.parametrize(
    ("value", "status", "code"), BAD_JSON, ids=lambda value: str(value)[:40]
)
def test_an_invalid_body_is_rejected(value, status, code):
    with pytest.raises(RejectedError) as caught:
        parse_upload(value if isinstance(value, bytes) else orjson.dumps(value), 10_000, 3)
    assert (caught.value.reason.status, caught.value.reason.code) == (status, code)
    assert "\n" not in caught.value.reason.message


def test_as_many_images_as_the_limit_are_accepted():
    upload = parse_upload(orjson.dumps({"images": ["YQ=="] * 3}), 10_000, 3)
    form = parse_form((PART + b"x\r\n") * 3 + b"--XX--\r\n", f"{FORM}; boundary=XX", 3)

    assert (upload.images, form.images) == ([b"a"] * 3, [b"x"] * 3)


@pytest.fixture(scope="module")
def text(jpeg) -> str:
    return base64.b64encode(jpeg).decode()


def test_images_in_json_have_the_same_response_as_raw_images(client, jpeg, text):
    plain = client.post("/v1/classify", content=jpeg).json()
    url_safe = text.replace("+", "-").replace("/", "_").rstrip("=")
    for image in (
        text,
        f"data:image/jpeg;base64,{text}",
        url_safe,
        base64.encodebytes(jpeg).decode(),
    ):
        assert client.post("/v1/classify", json={"image": image}).json() == plain

    assert client.post("/v1/classify", json={"images": [text]}).json() == {"results": [plain]}
    two = client.post("/v1/classify", json={"images": [text, "aGVsbG8="]}).json()["results"]
    bad = two[1]["error"]
    assert two[0] == plain
    assert bad["code"] == "not_an_image"
    assert bad["status"] == 415


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("/v1/classify?topk=2", "model, version, top_k, threshold, explain, reported"),
        ("/v1/embed?top_k=2", "model, version, encoding_format"),
        ("/v1/card?modle=tiny", "model"),
    ],
)
def test_an_unknown_parameter_is_400_with_the_known_ones(client, jpeg, path, known):
    method = "GET" if "card" in path else "POST"
    reply = client.request(method, path, content=jpeg)
    assert (reply.status_code, reply.json()["code"]) == (400, "unknown_parameter")

    given = path.partition("?")[2].partition("=")[0]
    assert reply.json()["detail"].startswith(f"{given!r}: ")
    assert reply.json()["detail"].endswith(f" {known}")


def test_the_largest_allowed_body_fits_into_the_memory_for_bodies(
    serve_with, monkeypatch
) -> None:
    """It is counted once: what has arrived is no longer announced."""
    monkeypatch.setattr(decoders, "MAX_UPLOAD_BYTES", 8_000_000)
    client = serve_with(FakeRuntime(num_classes=7), max_body_bytes=7_000_000)

    assert client.post("/v1/classify", content=bytes(7_000_000)).status_code == 415
