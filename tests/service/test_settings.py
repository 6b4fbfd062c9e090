"""Settings and their sources; batch limits."""

import re
import tomllib

import pydantic
import pytest

from sopdeploy.errors import ConfigError
from sopdeploy.images.limits import FORMATS
from sopdeploy_commands.serve import serve
from sopdeploy_service.api import admission
from sopdeploy_service.devices.processes import list_devices
from sopdeploy_service.former_settings import FORMER_SETTINGS
from sopdeploy_service.inference import decoders
from sopdeploy_service.inference.loader import largest_batch
from sopdeploy_service.server import http_protocol
from sopdeploy_service.settings import (
    LARGEST_BODY,
    MAX_UPLOAD_BYTES,
    Settings,
    describe_unused_variables,
    load_settings,
    parse_assignments,
    to_toml,
)
from tests.support.fake_runtime import FakeRuntime


def test_arguments_override_the_environment_and_it_overrides_the_file(monkeypatch, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("port = 6000\ntop_k = 2\nmax_images = 3\n")
    monkeypatch.setenv("SOPDEPLOY_PORT", "9000")
    monkeypatch.setenv("SOPDEPLOY_TOP_K", "4")
    settings = load_settings(file, port=7000, top_k=None)

    assert settings.port == 7000
    assert settings.top_k == 4
    assert settings.max_images == 3
    assert settings.queue_size == 256
    assert load_settings(file, port=0).port == 0  # an argument, and not the lack of one

    settings = Settings(keep=tmp_path / 'an "odd" name 😀', devices=("0", "1"))
    assert Settings(**tomllib.loads(to_toml(settings))).model_dump() == settings.model_dump()


# Of 0.3.0 or before, without those that have left. A setting that is renamed gets its former name as
# a `validation_alias`.
RELEASED = """
allowed_hosts allowed_origins
decoders devices drain_seconds engine_cache examples follow front_ends
host keep keep_bytes keep_days keep_sample keys
log log_level max_batch max_body_bytes max_connections max_images max_pixels
port queue_size request_timeout require_signature root_path runtime sandbox
threads top_k trusted_proxies
"""


def test_each_setting_of_the_released_version_is_accepted_by_its_name() -> None:
    accepted = {*Settings.model_fields}
    for field in Settings.model_fields.values():
        if isinstance(field.validation_alias, pydantic.AliasChoices):
            accepted |= {str(name) for name in field.validation_alias.choices}

    assert {*RELEASED.split()} - accepted == set()


# Values of former settings that protected more than the server does now, and others; each limit is
# tried below, at and above what holds now, and as a text of no number
LIMITS = {
    "body_grace_seconds": admission.BODY_GRACE_SECONDS,
    "decode_seconds": decoders.DECODE_SECONDS,
    "header_timeout": http_protocol.HEADER_SECONDS,
    "max_json_bytes": admission.MAX_JSON_BYTES,
    "max_upload_bytes": MAX_UPLOAD_BYTES,
    "write_timeout": http_protocol.WRITE_SECONDS,
}
PROTECTED: dict[str, tuple[list[object], list[object]]] = {
    **{
        name: ([limit - 1, "", "10 s", "nan"], [limit, limit + 1])
        for name, limit in LIMITS.items()
    },
    "min_body_rate": (
        [admission.MIN_BODY_RATE + 1, "fast"],
        [admission.MIN_BODY_RATE, admission.MIN_BODY_RATE - 1],
    ),
    "formats": (["jpeg", "JPEG, png", ""], [",".join(FORMATS), ", ".join(FORMATS).upper()]),
    "memory_budget": (["20GB", "1"], []),
    "metrics_need_key": (["true", "1", "yes", "required"], ["false", "0", "off"]),
    "batch_timeout_seconds": ([], ["1"]),
    "keep_alive_seconds": ([], ["5", "3700"]),
    "load_timeout": ([], ["10"]),
    "log_sample": ([], ["0", "1"]),
    "max_queue_delay_ms": ([], ["5"]),
}


def test_each_former_setting_has_cases() -> None:
    assert PROTECTED.keys() == FORMER_SETTINGS.keys()
    assert FORMER_SETTINGS.keys() & Settings.model_fields.keys() == set()


@pytest.mark.parametrize("name", PROTECTED)
def test_a_variable_whose_protection_has_left_refuses_the_start(monkeypatch, name):
    stricter, others = PROTECTED[name]
    variable = f"SOPDEPLOY_{name}".upper()

    for value in stricter:
        monkeypatch.setenv(variable, str(value))
        with pytest.raises(ConfigError, match=variable) as caught:
            serve("bundle", print_config=True)
        assert FORMER_SETTINGS[name].instead in str(caught.value)
    for value in others:
        monkeypatch.setenv(variable, str(value))
        (note,) = describe_unused_variables()
        assert variable in note
        assert FORMER_SETTINGS[name].instead in note


def test_all_that_has_left_is_reported_in_one_message(monkeypatch, tmp_path, capsys):
    """With an error, of a file, of an argument and of the environment; without one, in one note."""
    file = tmp_path / "settings.toml"
    in_file = ["header_timeout", "keep_alive_seconds", "formats"]
    file.write_text("".join(f"{name} = 1\n" for name in in_file))
    monkeypatch.setenv("SOPDEPLOY_LOAD_TIMEOUT", "60")
    monkeypatch.setenv("SOPDEPLOY_LOG_SAMPLE", "0.1")
    variables = ["SOPDEPLOY_LOAD_TIMEOUT", "SOPDEPLOY_LOG_SAMPLE"]

    given = parse_assignments(["metrics_need_key=false"])
    with pytest.raises(ConfigError) as caught:
        serve("bundle", config=file, **given)
    message = str(caught.value)
    assert [name for name in (*in_file, *given, *variables) if name not in message] == []
    assert "\n" not in message

    # None of the variables protected anything.
    assert serve("bundle", print_config=True) == 0
    (note,) = [line for line in capsys.readouterr().err.split("note:") if line.strip()]
    assert [name for name in variables if name not in "".join(note.split())] == []

    # One of them did, so all are in the error.
    monkeypatch.setenv("SOPDEPLOY_METRICS_NEED_KEY", "true")
    with pytest.raises(ConfigError) as caught:
        serve("bundle", print_config=True)
    for name in (*variables, "SOPDEPLOY_METRICS_NEED_KEY"):
        assert name in str(caught.value)


def test_other_commands_than_serve_are_not_refused(monkeypatch):
    monkeypatch.setenv("SOPDEPLOY_METRICS_NEED_KEY", "true")

    assert load_settings().keys == Settings().keys


def test_a_list_of_words_has_spaces_and_commas_as_people_write_them() -> None:
    """Of every setting with words, also if the last comma is left."""
    words = {
        name: field
        for name, field in Settings.model_fields.items()
        if field.annotation == tuple[str, ...]
    }
    assert len(words) >= 2

    for name, field in words.items():
        settings = Settings(**{name: " a.example, ,b.example,"})
        assert getattr(settings, name) == ("a.example", "b.example"), field


# PORT and SOPDEPLOY_PORT -> the port, with the one of a file or without
PORTS = {
    "of the platform": ({"PORT": "8080"}, "", 8080),
    "of the environment": ({"PORT": "8080", "SOPDEPLOY_PORT": "9000"}, "", 9000),
    "of the file": ({"PORT": "8080"}, "port = 6000", 6000),
    "of another program": ({"PORT": "tcp://10.0.0.1:80"}, "", 8000),
}


@pytest.mark.parametrize(("variables", "text", "expected"), PORTS.values(), ids=PORTS)
def test_a_port_that_nothing_sets_is_the_one_of_the_platform(
    monkeypatch, tmp_path, variables, text, expected
):
    file = tmp_path / "settings.toml"
    file.write_text(text)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert load_settings(file).port == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prot": 1}, "prot: "),
        ({"request_timeout": float("nan")}, "request_timeout"),
        ({"max_pixels": 10**9}, "max_pixels"),
        ({"max_images": 20, "queue_size": 10}, "max_images"),
        ({"devices": "gpu"}, "devices"),
        ({"devices": "0,cpu", "runtime": "tensorrt"}, "devices"),
        ({"max_body_bytes": LARGEST_BODY + 1}, "max_body_bytes"),
        ({"write_timeout": 1}, "write_timeout"),  # of 0.3.0
        ({"allowed_hosts": "a b"}, "'a b'"),
        ({"allowed_hosts": "http://"}, "host"),
        ({"allowed_hosts": "a.example/ml"}, "host"),
        ({"allowed_hosts": "a.example:99999"}, "allowed_hosts: .*[Pp]ort"),
        ({"trusted_proxies": "proxy.example"}, "trusted_proxies: .*proxy.example"),
        ({"root_path": "ml"}, "root_path: "),
        ({"root_path": "/a b"}, "root_path: "),
    ],
)
def test_an_invalid_setting_is_named(given, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(**given)


NO_NAME = "expected name=value"


def test_an_invalid_environment_variable_or_assignment_is_named(monkeypatch):
    monkeypatch.setenv("SOPDEPLOY_PORT", "tcp://10.0.0.1:80")
    with pytest.raises(ConfigError, match=r"port.*enableServiceLinks"):
        load_settings()

    for text, problem in (
        ("port", "give it a value, port=VALUE"),
        ("prot=1", NO_NAME),
        ("=1", NO_NAME),
    ):
        name = text.partition("=")[0]
        with pytest.raises(ConfigError, match=re.escape(f"{name}: {problem}")):
            parse_assignments([text])


@pytest.mark.parametrize(
    ("device", "wanted", "expected"),
    [
        ("cpu", None, 4),
        ("cpu", 16, 16),
        ("cpu", 100, 64),
        ("cuda:0", None, 64),
        ("cuda:0", 2, 2),
    ],
)
def test_the_largest_batch_is_small_on_a_cpu_and_always_verified(device, wanted, expected):
    runtime = FakeRuntime(num_classes=2, largest_batch=64, device=device)
    assert largest_batch(runtime, Settings(max_batch=wanted)) == expected


def test_a_process_on_the_cpu_gets_the_runtime_for_cpus() -> None:
    on_cpu, on_gpu = list_devices(Settings(devices=("cpu", "0"), runtime="auto"))
    assert (on_cpu.settings.runtime, on_gpu.settings.runtime) == ("onnxruntime-cpu", "auto")


def test_connections_may_be_idle_longer_than_at_common_proxies():
    seconds = {"Caddy": 120, "Traefik": 90, "AWS": 60, "Google Cloud": 600, "Envoy": 3600}

    assert max(seconds.values()) < http_protocol.PROXY_IDLE_SECONDS
    assert min(seconds.values()) < http_protocol.KEEP_ALIVE_SECONDS  # nginx need not be listed
