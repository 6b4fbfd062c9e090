"""Settings of earlier versions: what replaces each, and which of their values protected something."""

from collections.abc import Callable
from typing import NamedTuple

import pydantic

from sopdeploy.images.limits import FORMATS


class FormerSetting(NamedTuple):
    """A setting that has left: what there is *instead*, and whether the text of a value *protected* more."""

    instead: str
    protected: Callable[[str], bool] = lambda _text: False


def _number(text: str) -> float:
    """Return the number that *text* is; NaN, with which no comparison holds, if it is none."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _is_on(text: str) -> bool:
    try:
        return pydantic.TypeAdapter(bool).validate_python(text)
    except pydantic.ValidationError:  # who wrote it wanted something
        return True


def _leaves_out_formats(text: str) -> bool:
    return not {*FORMATS} <= {name.strip().lower() for name in text.split(",")}


# All of 0.3.0 and before. Most have a fixed value now, and protected more with a stricter one.
FORMER_SETTINGS = {
    "batch_timeout_seconds": FormerSetting("20 times the usual time of a batch, at least 4 s"),
    "body_grace_seconds": FormerSetting(
        "10 s, or client_body_timeout of nginx", lambda text: not _number(text) >= 10
    ),
    "decode_seconds": FormerSetting(
        "20 s, and less with a lower max_pixels", lambda text: not _number(text) >= 20
    ),
    "formats": FormerSetting(
        "all formats are decoded in a sandbox, which sandbox=required insists on",
        _leaves_out_formats,
    ),
    "header_timeout": FormerSetting(
        "10 s, or client_header_timeout of nginx", lambda text: not _number(text) >= 10
    ),
    "keep_alive_seconds": FormerSetting("75 s, or max_connection_age"),
    "load_timeout": FormerSetting("120 s, with a GPU 600 s"),
    "log_sample": FormerSetting("log_level=warning"),
    "max_json_bytes": FormerSetting(
        "16 MB, or less with a lower max_body_bytes",
        lambda text: not _number(text) >= 16_000_000,
    ),
    "max_queue_delay_ms": FormerSetting("an idle runtime starts at once"),
    "max_upload_bytes": FormerSetting(
        "256 MB, or an eighth of the container's memory",
        lambda text: not _number(text) >= 256_000_000,
    ),
    "memory_budget": FormerSetting(
        "all networks are loaded at the start, so serve fewer, and limit the container's memory",
        lambda _text: True,
    ),
    "metrics_need_key": FormerSetting(
        "hide /metrics in your proxy, as on the page Behind a proxy", _is_on
    ),
    "min_body_rate": FormerSetting(
        "10 kB/s, or a proxy that receives whole bodies first, such as nginx",
        lambda text: not _number(text) <= 10_000,
    ),
    "write_timeout": FormerSetting(
        "30 s, or send_timeout of nginx", lambda text: not _number(text) >= 30
    ),
}
