"""What requests cost, at every endpoint: a request twice as large costs at most twice as much.

The costs are calls of functions and bytes of objects, counted in this process without a socket.
Tables have a row for each header and field that a client can fill; tests compare them with the
code. Inference is replaced: only what comes before it depends on a client's bytes.
"""

import asyncio
import cProfile
import gc
import re
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
from fastapi import FastAPI

from sopdeploy_service.api.admission import ClassifyRequest
from sopdeploy_service.api.v2.request import InferBody
from sopdeploy_service.api.v2.routes import HEADER_LENGTH
from sopdeploy_service.app import create_app
from sopdeploy_service.http.api_keys import new_key
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.inference.results import DAMAGED
from sopdeploy_service.origins import parse_host
from sopdeploy_service.settings import Settings
from tests.support.fake_runtime import FakeRuntime

pytestmark = pytest.mark.slow
SERVICE = Path(__file__).parents[2] / "service" / "sopdeploy_service"
SIZE = 15_000  # bytes of a body; the test also sends twice as many
# The server accepts 32,000, 8,000 and 10,000
HEADER_SIZE = 4_000
URL_SIZE = 1_000
LABEL_SIZE = 4_900
# Of any request, and what differs from one run to the next
FREE_CALLS = 3_000
FREE_BYTES = 300_000
CALLS_PER_BYTE, BYTES_PER_BYTE = 10, 160  # two brackets become a list of almost 300 bytes


class Cost(NamedTuple):
    calls: int
    bytes: int


class Reply(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


class InThisThread(Executor):
    """Runs work at once, where its calls are counted."""

    def submit(self, work: Callable[..., Any], /, *given: Any, **options: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(work(*given, **options))
        except Exception as error:
            future.set_exception(error)
        return future


class Site(NamedTuple):
    """An app, the event loop that runs it, and headers that its requests have unless they replace them."""

    app: FastAPI
    loop: asyncio.AbstractEventLoop
    headers: dict[str, bytes]
    limited: dict[str, bytes]  # headers with a key that has a rate

    def send(
        self, method: str, path: str, headers: dict[str, bytes], body: bytes, query: bytes
    ) -> Reply:
        messages: list[Any] = []
        incoming = iter([{"type": "http.request", "body": body, "more_body": False}])
        left = asyncio.Event()

        async def receive() -> Any:
            if (message := next(incoming, None)) is not None:
                return message
            await left.wait()  # the client stays until it has the response
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            messages.append(message)

        all_headers = {**self.headers, "content-length": b"%d" % len(body), **headers}
        scope = {
            "type": "http", "http_version": "1.1", "method": method, "path": path, "raw_path": path.encode(),
            "query_string": query, "headers": [(name.encode(), value) for name, value in all_headers.items()],
            "client": ("127.0.0.1", 9), "server": ("127.0.0.1", 80), "scheme": "http", "root_path": "",
        }  # fmt: skip

        async def exchange() -> None:
            await self.app(scope, receive, send)
            left.set()
            if tasks := asyncio.all_tasks() - {asyncio.current_task()}:
                await asyncio.wait(tasks)  # a task that stays makes each later request dearer

        self.loop.run_until_complete(exchange())
        content = b"".join(message.get("body", b"") for message in messages)
        sent = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
        return Reply(messages[0]["status"], content, sent)

    def cost(self, *request: Any) -> tuple[Reply, Cost]:
        """Send *request* and count; the counter in C takes a fifth of the time of one in Python."""
        elsewhere = 0

        def count(_frame: FrameType, event: str, _argument: Any) -> None:
            nonlocal elsewhere
            elsewhere += event in {"call", "c_call"}

        parse_host.cache_clear()  # which a client can fill with other names
        # The tasks of earlier requests, which anyio lists, and whose end it would count
        gc.collect(1)
        gc.disable()
        counted = cProfile.Profile()
        tracemalloc.start()
        threading.setprofile(count)
        counted.enable()
        try:
            reply = self.send(*request)
        finally:
            counted.disable()
            threading.setprofile(None)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            gc.enable()
        calls = sum(entry.callcount for entry in counted.getstats())
        return reply, Cost(calls + elsewhere, peak)


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Leave what other tests of this process have made to no further collection: there are thousands here."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.fixture(scope="module")
def service(bundle, loop, tmp_path_factory) -> Iterator[Site]:
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    secret = new_key(keys, "app")
    limited = new_key(keys, "limited", 1e-6)
    settings = Settings(
        keys=keys, trusted_proxies="127.0.0.1", allowed_hosts="*.shop.example,bücher.example"
    )
    model = LoadedModel(bundle=bundle, runtime=FakeRuntime(num_classes=7), replays={})
    app = create_app({"tiny": model}, settings)

    async def infer(_self: Any, images: Any, **_options: Any) -> list[Any]:
        return [DAMAGED] * len(images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sopdeploy_service.api.admission.AdmittedRequest.infer", infer)
        patch.setattr("sopdeploy_service.observability.pages.SHARED_SECONDS", 3600.0)
        app.state.service._is_started = True
        app.state.service.parsers = InThisThread()
        own = {"host": b"localhost", "x-api-key": secret.encode()}
        of_limited = {"x-api-key": limited.encode()}
        yield Site(app, loop, own, of_limited)


def check_cost(site: Site, size: int, request: Callable[[int], tuple[Any, ...]]) -> set[int]:
    """Check the costs of the requests of *size* and twice as much; return the statuses."""
    site.send(*request(size))  # fills caches
    (small, once) = site.cost(*request(size))
    (large, twice) = site.cost(*request(2 * size))
    for reply in (small, large):
        assert reply.status < 500, reply
        assert len(reply.body) < 2 * URL_SIZE or reply.status < 400, reply.body[:500]
    assert twice.calls <= min(2 * once.calls, once.calls + CALLS_PER_BYTE * size) + FREE_CALLS
    assert twice.bytes <= min(2 * once.bytes, once.bytes + BYTES_PER_BYTE * size) + FREE_BYTES
    return {small.status, large.status}


def filled(unit: bytes, size: int, first: bytes = b"", last: bytes = b"") -> bytes:
    """*first*, as many copies of *unit* as make *size* bytes, *last*."""
    return first + unit * max(1, (size - len(first) - len(last)) // len(unit)) + last


# Values of JSON of about so many bytes, to put where a request has another one.
VALUES: dict[str, Callable[[int], bytes]] = {
    "a text": lambda size: filled(b"A", size, b'"', b'"'),
    "a text with escapes": lambda size: filled(b"\\\\", size, b'"', b'"'),
    "a text with quotes": lambda size: filled(b'\\"', min(size, 9_000), b'"', b'"'),
    "fractions": lambda size: filled(b"1.5,", size, b"[", b"0]"),
    "texts": lambda size: filled(b'"A",', min(size, 9_000), b"[", b'"A"]'),
    "one long text among short ones": lambda size: b'["%b"%b]' % (b"A" * size, b',"A"' * 3071),
    "one long text among numbers": lambda size: b'["%b"%b]' % (b"A" * size, b",0" * 3071),
    "empty lists": lambda size: filled(b"[],", size, b"[", b"[]]"),
    "empty objects": lambda size: filled(b"{},", size, b"[", b"{}]"),
    "keys": lambda size: (
        b"{%b}" % b",".join(b'"%d":0' % n for n in range(min(size // 10, 4_000)))
    ),
    "the same key": lambda size: filled(b'"a":0,', min(size, 14_000), b"{", b'"a":0}'),
    "levels": lambda size: b"[" * (size // 2) + b"]" * (size // 2),
    "digits": lambda size: b"1" * size,
    "digits of an exponent": lambda size: b"1e" + b"0" * size + b"1",
}
INPUT = b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0]%b}]%b}'
# By model: a request with `%b` in the place of the field
FIELDS = {
    ClassifyRequest: {
        "image": b'{"image": %b}',
        "images": b'{"images": %b}',
        "images.0": b'{"images": [%b]}',
        "an unknown one": b'{"x": %b}',
        "the body": b"%b",
    },
    InferBody: {
        "id": INPUT % (b"", b', "id": %b'),
        "parameters": INPUT % (b"", b', "parameters": %b'),
        "parameters.binary_data_output": INPUT
        % (b"", b', "parameters": {"binary_data_output": %b}'),
        "parameters.timeout": INPUT % (b"", b', "parameters": {"timeout": %b}'),
        "inputs": b'{"inputs": %b}',
        "inputs.0": b'{"inputs": [%b]}',
        "inputs.0.name": b'{"inputs": [{"name": %b, "datatype": "UINT8", "shape": [1], "data": [0]}]}',
        "inputs.0.datatype": b'{"inputs": [{"name": "images", "datatype": %b, "shape": [1], "data": [0]}]}',
        "inputs.0.shape": b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": %b, "data": [0]}]}',
        "inputs.0.shape.0": b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [%b]}]}',
        "inputs.0.parameters": INPUT % (b', "parameters": %b', b""),
        "inputs.0.parameters.binary_data_size": INPUT
        % (b', "parameters": {"binary_data_size": %b}', b""),
        "inputs.0.data": INPUT.replace(b"[0]", b"%b") % (b"%b", b"", b""),
        "inputs.0.data of texts": (
            b'{"inputs": [{"name": "IMAGE", "datatype": "BYTES", "shape": [1, 1], "data": %b}]}'
        ),
        "inputs.0.data.0": INPUT.replace(b"[0]", b"[%b" + b", 0" * 3071 + b"]")
        % (b"%b", b"", b""),
        "inputs.0.data.0 of nested ones": INPUT.replace(b"[0]", b"[[[%b]]]")
        % (b"%b", b"", b""),
        "outputs": INPUT % (b"", b', "outputs": %b'),
        "outputs.0": INPUT % (b"", b', "outputs": [%b]'),
        "outputs.0.name": INPUT % (b"", b', "outputs": [{"name": %b}]'),
        "outputs.0.parameters": INPUT
        % (b"", b', "outputs": [{"name": "logits", "parameters": %b}]'),
        "outputs.0.parameters.binary_data": (
            INPUT
            % (b"", b', "outputs": [{"name": "logits", "parameters": {"binary_data": %b}}]')
        ),
        "outputs.0.parameters.classification": (
            INPUT
            % (b"", b', "outputs": [{"name": "logits", "parameters": {"classification": %b}}]')
        ),
        "an unknown one": INPUT % (b"", b', "x": %b'),
        "the body": b"%b",
    },
}
INFER = "/v2/models/{name}/infer"
VERSIONED = "/v2/models/{name}/versions/{version}/infer"
# Routes that read JSON, and their models
MODELS = {"/v1/classify": ClassifyRequest, "/invocations": ClassifyRequest, INFER: InferBody}
# Fields without a maximum length, which the size of the body limits
UNLIMITED = {
    "ClassifyRequest.image", "ClassifyRequest.images",  # base64 of images
    "InputTensor.data",  # its elements are typed in one pass
}  # fmt: skip


def fields_of(
    schema: dict[str, Any], definitions: dict[str, Any], path: str = ""
) -> Iterator[str]:
    """List the paths of all fields of *schema*, as in `FIELDS`."""
    for option in schema.get("anyOf", [schema]):
        found = definitions[option["$ref"].rpartition("/")[2]] if "$ref" in option else option
        for name, field in found.get("properties", {}).items():
            inner = f"{path}.{name}".strip(".")
            yield inner
            yield from fields_of(field, definitions, inner)
        if "items" in found:
            yield f"{path}.0"
            yield from fields_of(found["items"], definitions, f"{path}.0")


def unlimited(schema: dict[str, Any], where: str) -> Iterator[str]:
    """List *where* in *schema* texts and lists have no maximum length."""
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            yield from unlimited(option, where)
    kind = schema.get("type")
    if kind == "array" and "maxItems" not in schema:
        yield where
    if kind == "array":
        yield from unlimited(schema["items"], where)
    if kind == "string" and not {"maxLength", "enum", "pattern"} & schema.keys():
        yield where
    if not schema.keys() & {"type", "$ref", "anyOf", "enum", "const", "allOf"}:  # `Any`
        yield where


def test_every_model_of_a_body_is_listed_with_maximum_lengths() -> None:
    source = "".join(path.read_text("utf-8") for path in SERVICE.glob("api/**/*.py"))
    assert set(re.findall(r"parse_json\((\w+),", source)) == {
        model.__name__ for model in FIELDS
    }

    found: set[str] = set()
    for model, fields in FIELDS.items():
        schema = model.model_json_schema()
        definitions = {model.__name__: schema, **schema.get("$defs", {})}
        assert set(fields_of(schema, definitions)) <= fields.keys()
        for name, one in definitions.items():
            for field, described in one["properties"].items():
                found.update(unlimited(described, f"{name}.{field}"))

    assert found == UNLIMITED


def path_of(route: str, bundle_id: str) -> str:
    return route.format(name="tiny", version=bundle_id, number=0)


@pytest.mark.parametrize(
    ("route", "field"),
    [(route, field) for route, model in MODELS.items() for field in FIELDS[model]],
)
def test_any_value_in_json_costs_as_much_as_its_size(service, bundle, route, field) -> None:
    path = path_of(route, bundle.manifest.id)
    template = FIELDS[MODELS[route]][field]
    statuses: set[int] = set()
    for value in VALUES.values():

        def request(size: int, value: Callable[[int], bytes] = value) -> tuple[Any, ...]:
            body = template.replace(b"%b", value(size))
            return "POST", path, {"content-type": b"application/json"}, body, b""

        statuses |= check_cost(service, SIZE, request)
    assert min(statuses) >= 400 or field in {
        "image",
        "images",
        "images.0",
        "id",
        "an unknown one",
    } | {name for name in FIELDS[InferBody] if "parameters" in name or "data" in name}


FORM = {"content-type": b"multipart/form-data; boundary=XX"}
RAW = {"content-type": b"image/png"}
CURL = {"content-type": b"application/x-www-form-urlencoded"}
PART = b'--XX\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
END = b"\r\n--XX--\r\n"
PIXELS_OF = (
    b'{"inputs": [{"name": "images", "datatype": "UINT8", "shape": [%d, 32, 32, 3], '
    b'"parameters": {"binary_data_size": %d}}]}'
)
IMAGE_OF = (
    PIXELS_OF.replace(b"images", b"IMAGE")
    .replace(b"UINT8", b"BYTES")
    .replace(b"%d, 32, 32, 3", b"%d")
)
ROW = b"[%b]" % b",".join([b"[255,255,255]"] * 32)


def legal_tensor(size: int) -> tuple[dict[str, bytes], bytes]:
    """The largest numbers of as many images as *size* bytes hold."""
    images = size // SIZE
    numbers = b",".join([b"255"] * 3072 * images)
    body = b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[%d,32,32,3],"data":[%b]}]}'
    return {}, body % (images, numbers)


def binary(text: bytes, content: bytes) -> tuple[dict[str, bytes], bytes]:
    return {HEADER_LENGTH.lower(): b"%d" % len(text)}, text + content


V1_BODIES: dict[str, Callable[[int], tuple[dict[str, bytes], bytes]]] = {
    "legal: an image": lambda size: (RAW, bytes(size)),
    "legal: a form with an image": lambda size: (FORM, PART + bytes(size) + END),
    "legal: a form with 64 images": lambda size: (
        FORM,
        (PART + bytes(size // 64) + b"\r\n") * 64 + b"--XX--\r\n",
    ),
    "legal: an image in JSON": lambda size: ({}, filled(b"AAAA", size, b'{"image":"', b'"}')),
    "legal: 64 images in JSON": lambda size: (
        {},
        b'{"images":[%b]}' % b",".join([b'"%b"' % (b"A" * (size // 256 * 4))] * 64),
    ),
    "an image without zeros, as curl sends it": lambda size: (CURL, b"\xff" * size),
    "a form with too many images": lambda size: (FORM, filled(PART + b"\r\n", size)),
    "a form of delimiters": lambda size: (FORM, filled(b"\r\n--X", size, PART, END)),
    "a form after the last delimiter": lambda size: (
        FORM,
        filled(b"\r\n--XX", size, PART + END),
    ),
    "a form with a long name of a header": lambda size: (
        FORM,
        filled(b"a", size, b"--XX\r\n", b": b\r\n\r\n" + END),
    ),
    "a form with many headers": lambda size: (
        FORM,
        filled(b"a: b\r\n", size, b"--XX\r\n", b"\r\n" + END),
    ),
    "a form that is cut": lambda size: (FORM, PART + bytes(size)),
}
V2_BODIES: dict[str, Callable[[int], tuple[dict[str, bytes], bytes]]] = {
    "legal: a tensor": legal_tensor,
    "legal: a nested tensor": lambda size: (
        {},
        INPUT.replace(b"[0]", b"[[%b]]" % b",".join([ROW] * 32)) % (b"", b""),
    ),
    "legal: a binary tensor": lambda size: binary(
        PIXELS_OF % (size // 3072, size // 3072 * 3072), bytes(size // 3072 * 3072)
    ),
    "legal: an encoded image": lambda size: binary(
        IMAGE_OF % (1, size + 4), size.to_bytes(4, "little") + bytes(size)
    ),
    "encoded images that are too long": lambda size: binary(
        IMAGE_OF % (64, size), b"\xff" * size
    ),
    "encoded images that are empty": lambda size: binary(IMAGE_OF % (64, size), bytes(size)),
    "a binary tensor without a size": lambda size: binary(INPUT % (b"", b""), bytes(size)),
    "too many encoded images": lambda size: binary(IMAGE_OF % (size, size), bytes(size)),
}
# Routes that read other bodies than JSON
BODIES = {"/v1/classify": V1_BODIES, INFER: V2_BODIES}


@pytest.mark.parametrize(
    ("route", "case"), [(route, case) for route, cases in BODIES.items() for case in cases]
)
def test_any_body_costs_as_much_as_its_size(service, bundle, route, case) -> None:
    def request(size: int) -> tuple[Any, ...]:
        headers, body = BODIES[route][case](size)
        return (
            "POST",
            path_of(route, bundle.manifest.id),
            {"content-type": b"application/json", **headers},
            body,
            b"",
        )

    statuses = check_cost(service, SIZE, request)
    if case.startswith("legal"):  # then `infer` has been called
        is_list = "64" in case and route != INFER
        assert statuses == {200 if is_list else DAMAGED.status}


# Names of headers that the code reads, for the values of `HEADER_VALUES`
HEADERS = {
    "authorization", "x-api-key", "x-request-id", "x-request-timeout-ms", "x-request-attempt",
    "content-type", "content-encoding",
    "host", "origin", "sec-fetch-site", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-for",
    "inference-header-content-length",
    "cookie", "accept", "x-unknown",  # these are read by libraries, or by none
}  # fmt: skip
# The first must be a number of 19 digits or less, or the server closes the connection; the
# other is an answer
NOT_SENT = {"content-length", "ratelimit-limit"}
HEADER_VALUES: dict[str, Callable[[int], bytes]] = {
    "letters": lambda size: b"a" * size,
    "labels": lambda size: filled(b"a.", size),
    "own subdomains": lambda size: filled(b"a.", size, b"", b"shop.example"),
    "many own names": lambda size: b",".join(
        b"a%d.shop.example" % n for n in range(size // 20)
    ),
    "commas": lambda size: b"," * size,
    "semicolons": lambda size: filled(b'";', size, b'multipart/form-data; boundary="'),
    "escapes": lambda size: filled(b'\\"', size, b'multipart/form-data; boundary="'),
    "cookies": lambda size: filled(b"a=\\141; ", size),
    "spaces": lambda size: b"Bearer" + b" " * size + b"a",
    "addresses": lambda size: filled(b"127.0.0.1,", size),
}


def test_every_header_that_the_code_reads_is_in_the_table() -> None:
    source = "".join(path.read_text("utf-8") for path in SERVICE.rglob("*.py"))
    read = set(re.findall(r"headers\.get\(\s*\"([a-z-]+)\"", source))
    named = {value.lower() for value in re.findall(r"HEADER\w* = \"([A-Za-z-]+)\"", source)}

    assert read | named <= HEADERS | NOT_SENT
    assert set(re.findall(r"alias=(\w+)", source)) == {"HEADER_LENGTH"}


@pytest.mark.parametrize("header", sorted(HEADERS))
def test_any_header_costs_as_much_as_its_size(service, header) -> None:
    for value in HEADER_VALUES.values():

        def request(size: int, value: Callable[[int], bytes] = value) -> tuple[Any, ...]:
            return "POST", "/v2/models/tiny/infer", {header: value(size)}, b"{}", b""

        assert min(check_cost(service, HEADER_SIZE, request)) >= 400


def test_forwarded_names_and_schemes_cost_as_much_as_their_size(service) -> None:
    """The origin is compared with each name and each scheme, and with no pair of them."""

    def request(size: int) -> tuple[Any, ...]:
        half = size // 2
        headers = {
            "x-forwarded-host": HEADER_VALUES["many own names"](half),
            "x-forwarded-proto": b",".join(b"app%d" % n for n in range(half // 8)),
            "origin": b"https://other.example",
        }
        return "POST", "/v2/models/tiny/infer", headers, b"{}", b""

    assert check_cost(service, HEADER_SIZE, request) == {403}


QUERIES: dict[str, Callable[[int], bytes]] = {
    "many parameters": lambda size: filled(b"a&", size),
    "a long name": lambda size: b"a" * size + b"=1",
    "a long value": lambda size: b"model=" + b"a" * size,
    "digits of a fraction": lambda size: b"threshold=0." + b"1" * size,
    "escapes": lambda size: filled(b"%C3", size, b"model="),
}


@pytest.mark.parametrize(
    "route", ["/v1/classify", "/invocations", "/v1/embed", INFER, VERSIONED]
)
def test_a_refused_request_that_a_key_pays_for_takes_a_token(service, bundle, route) -> None:
    headers = {**service.limited, "content-type": b"application/json"}
    request = "POST", path_of(route, bundle.manifest.id), headers, b"{", b""
    before, after = (
        int(service.send(*request).headers["ratelimit-remaining"]) for _ in range(2)
    )

    assert after == before - 1


def paths_of(site: Site) -> set[tuple[str, str]]:
    """Return the methods and paths of all routes."""
    return {
        (method, route.path)
        for route in routes_of(site.app.routes)
        for method in route.methods - {"HEAD"}
    }


def routes_of(routes: Iterable[Any]) -> Iterator[Any]:
    """List *routes* and, of those that are routers, theirs."""
    for route in routes:
        inner = getattr(route, "original_router", None) or getattr(route, "routes", None)
        if hasattr(route, "methods"):
            yield route
        else:
            yield from routes_of(getattr(inner, "routes", inner) or ())


@pytest.mark.parametrize("query", QUERIES)
def test_any_query_costs_as_much_as_its_size(service, bundle, query) -> None:
    for method, template in paths_of(service):
        path = path_of(template, bundle.manifest.id)

        def request(size: int, method: str = method, path: str = path) -> tuple[Any, ...]:
            return method, path, {}, b"", QUERIES[query](size)

        check_cost(service, URL_SIZE, request)


@pytest.mark.parametrize("text", ["a", "\u00e9", "%2e", "{}", ".", "a/"])
def test_any_path_costs_as_much_as_its_size(service, bundle, text) -> None:
    values = {"name": "tiny", "version": bundle.manifest.id, "number": 0}
    templates = [("GET", "/{name}"), *paths_of(service)]
    for method, template, name in [
        (*one, name) for one in templates for name in re.findall(r"\{(\w+)\}", one[1])
    ]:

        def request(
            size: int, method: str = method, template: str = template, name: str = name
        ) -> tuple[Any, ...]:
            return method, template.format(**{**values, name: text * size}), {}, b"", b""

        check_cost(service, URL_SIZE, request)


def test_a_request_for_which_the_memory_does_not_suffice_is_503(service, monkeypatch) -> None:
    def fail(*_given: object) -> None:
        raise MemoryError

    monkeypatch.setattr("sopdeploy_service.api.admission.parse_upload", fail)
    reply = service.send(
        "POST", "/v1/classify", {"content-type": b"application/json"}, b"{}", b""
    )
    assert reply.status == 503
    assert b"out_of_memory" in reply.body
