"""Generate the Grafana dashboard `deploy/dashboard.json`: `python deploy/dashboard.py`.

`sopdeploy_service.observability.metrics` defines the metrics; docs/metrics.md lists them. A
test checks that the file is up to date.
"""

import json
import re
from pathlib import Path
from typing import Any

from prometheus_client.metrics import MetricWrapperBase

from sopdeploy_service.observability.metrics import Metrics

PAGE = Path(__file__).parent / "dashboard.json"
SOURCE = {"type": "prometheus", "uid": "${source}"}
WIDTH, HEIGHT = 12, 8


def quantiles(metric: str, by: str) -> list[tuple[str, str]]:
    """Build the queries for median and p99 of the histogram *metric*, per value of the label *by*."""
    rate = f"sum by (le, {by}) (rate({metric}_bucket[$__rate_interval]))"
    return [
        (f"histogram_quantile({quantile}, {rate})", f"{name} {{{{{by}}}}}")
        for name, quantile in (("p50", 0.5), ("p99", 0.99))
    ]


RATE = "[$__rate_interval]"
PANELS: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        "Responses per second, by status",
        "reqps",
        [(f"sum by (code) (rate(sopdeploy_requests_total{RATE}))", "{{code}}")],
    ),
    ("Request duration", "s", quantiles("sopdeploy_request_duration_seconds", "route")),
    (
        "Request duration of each model",
        "s",
        quantiles("sopdeploy_request_duration_seconds", "model"),
    ),
    (
        "Mean time of a request with images, and of its stages",
        "s",
        [
            (
                f"sum by (model, part) (rate(sopdeploy_inference_seconds_sum{RATE}))"
                f" / sum by (model, part) (rate(sopdeploy_inference_seconds_count{RATE}))",
                "{{model}} {{part}}",
            )
        ],
    ),
    (
        "Time since the last request with images",
        "s",
        [
            (
                "time() - max by (model) (sopdeploy_last_inference_timestamp_seconds > 0)",
                "{{model}}",
            )
        ],
    ),
    (
        "Memory of each process",
        "bytes",
        [("process_resident_memory_bytes", "{{instance}} {{process}}")],
    ),
    (
        "Cores in use",
        "none",
        [(f"rate(process_cpu_seconds_total{RATE})", "{{instance}} {{process}}")],
    ),
    ("Duration of each stage", "s", quantiles("sopdeploy_stage_duration_seconds", "stage")),
    (
        "Images per second",
        "ops",
        [(f"sum by (model) (rate(sopdeploy_batch_size_sum{RATE}))", "{{model}}")],
    ),
    (
        "Mean batch size",
        "none",
        [
            (
                f"sum by (model) (rate(sopdeploy_batch_size_sum{RATE}))"
                f" / sum by (model) (rate(sopdeploy_batch_size_count{RATE}))",
                "{{model}}",
            )
        ],
    ),
    (
        "Closed batches, by reason",
        "ops",
        [(f"sum by (reason) (rate(sopdeploy_batch_close_total{RATE}))", "{{reason}}")],
    ),
    (
        "Kept photographs, by result",
        "ops",
        [
            (f"sum by (result) (rate(sopdeploy_kept_images_total{RATE}))", "{{result}}"),
            (
                f"sum by (reason) (rate(sopdeploy_kept_deleted_total{RATE}))",
                "deleted {{reason}}",
            ),
        ],
    ),
    (
        "Images that wait, and that run",
        "none",
        [
            ("sum by (instance) (sopdeploy_images_waiting)", "{{instance}} waiting"),
            ("sum by (instance) (sopdeploy_images_running)", "{{instance}} running"),
        ],
    ),
    (
        "Busy share, of the busiest process",
        "percentunit",
        [("max by (instance) (sopdeploy_busy)", "{{instance}}")],
    ),
    (
        "Runtime utilization",
        "percentunit",
        [(f"rate(sopdeploy_runtime_seconds_total{RATE})", "{{instance}} {{model}}")],
    ),
    (
        "Decoder utilization",
        "percentunit",
        [
            (
                f"rate(sopdeploy_decode_seconds_total{RATE}) / sopdeploy_decoders",
                "{{instance}}",
            )
        ],
    ),
    (
        "Rejected requests, by reason",
        "ops",
        [(f"sum by (reason) (rate(sopdeploy_rejected_total{RATE}))", "{{reason}}")],
    ),
    (
        "Requests per second, by the attempt of the client",
        "reqps",
        [(f"sum by (attempt) (rate(sopdeploy_attempts_total{RATE}))", "{{attempt}}")],
    ),
    (
        "Disconnected clients, non-finite outputs",
        "ops",
        [
            (f"sum(rate(sopdeploy_cancelled_total{RATE}))", "disconnected clients"),
            (
                f"sum by (model) (rate(sopdeploy_nonfinite_outputs_total{RATE}))",
                "non-finite {{model}}",
            ),
        ],
    ),
    (
        "Decoders that ended, by reason",
        "ops",
        [(f"sum by (reason) (rate(sopdeploy_decoder_ended_total{RATE}))", "{{reason}}")],
    ),
    (
        "Images of unknown classes",
        "ops",
        [(f"sum by (model) (rate(sopdeploy_unknown_images_total{RATE}))", "{{model}}")],
    ),
    (
        "Drift: shift from earlier answers, in standard deviations",
        "none",
        [("sopdeploy_drift_shift", "{{model}} {{of}}")],
    ),
    (
        "Answers in the newest window, which drift is measured on",
        "none",
        [("sopdeploy_drift_images", "{{model}}")],
    ),
    (
        "Drift: p-values; below 0.002, with a shift over 0.1, is an alarm",
        "none",
        [("sopdeploy_drift_p_value", "{{model}} {{of}}")],
    ),
    ("Maximum event loop lag", "s", [("sopdeploy_event_loop_lag_seconds", "{{instance}}")]),
    ("Open connections", "none", [("sopdeploy_connections", "{{instance}}")]),
    ("Limits", "none", [("max by (of) (sopdeploy_limit)", "{{of}}")]),
    (
        "Processes that are ready",
        "none",
        [("sum by (instance) (sopdeploy_ready)", "{{instance}}")],
    ),
    (
        "Time of the last load; time since the last successful reload",
        "s",
        [
            ("sopdeploy_last_load_seconds", "load {{model}}"),
            (
                "time() - max by (instance) (sopdeploy_last_reload_timestamp_seconds)",
                "since reload {{instance}}",
            ),
        ],
    ),
    (
        "Failed loads of models",
        "ops",
        [(f"sum by (code) (rate(sopdeploy_load_failures_total{RATE})) > 0", "failed {{code}}")],
    ),
    (
        "Request bodies in memory; memory that one image may need to be decoded",
        "bytes",
        [
            ("sopdeploy_upload_bytes", "bodies {{instance}}"),
            ("sopdeploy_max_decode_bytes", "image {{instance}}"),
        ],
    ),
    (
        "Dropped log lines",
        "ops",
        [(f"rate(sopdeploy_dropped_log_lines_total{RATE})", "{{instance}}")],
    ),
]


# What the reader chooses, and the label of the series. A release has its job; the chart names
# instances by their pods. A pattern stands for "All" where the label may be missing: in Docker,
# without a model.
CHOICES = {
    "Namespace": "namespace",
    "Release": "job",
    "Pod or address": "instance",
    "Model": "model",
}
ONE_FOR_EACH = (
    "sopdeploy_batch_size_count"  # a series with all these labels, from the start of a server
)


def names_by_label() -> dict[str, set[str]]:
    """Return the names of the metrics that have each label."""
    found: dict[str, set[str]] = {}
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            for label in metric._labelnames:
                found.setdefault(label, set()).update(
                    family.name for family in metric.describe()
                )
    return found


WITH_MODEL = names_by_label()["model"]


def chosen(query: str) -> str:
    """Restrict each series of *query* to what the reader chooses."""

    def restrict(found: re.Match[str]) -> str:
        has_model = re.sub(r"_(total|bucket|sum|count)$", "", found[0]) in WITH_MODEL
        labels = [label for label in CHOICES.values() if label != "model" or has_model]
        return f"{found[0]}{{{matchers(labels)}}}"

    return re.sub(r"\b(?:sopdeploy|process)_\w+", restrict, query)


def matchers(labels: list[str]) -> str:
    """Build the selector of the series whose *labels* have the chosen values."""
    return ",".join(f'{label}=~"${label}"' for label in labels)


def variables() -> list[dict[str, Any]]:
    """Build the fields at the top: the source of the data, and `CHOICES`, each narrowed by those before."""
    fields: list[dict[str, Any]] = [
        {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus"}
    ]
    labels = [*CHOICES.values()]
    for index, (title, label) in enumerate(CHOICES.items()):
        series = f"{ONE_FOR_EACH}{{{matchers(labels[:index])}}}"
        query = {"query": f"label_values({series}, {label})", "refId": label}
        field: dict[str, Any] = {
            "name": label,
            "label": title,
            "type": "query",
            "datasource": SOURCE,
            "query": query,
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
        }
        if label in ("namespace", "model"):
            field["allValue"] = ".*"
        field["current"] = {"text": ["All"], "value": ["$__all"]}
        fields.append(field)
    return fields


def panel(number: int, title: str, unit: str, queries: list[tuple[str, str]]) -> dict[str, Any]:
    """Build one graph; *number* determines its position."""
    row, column = divmod(number, 2)
    return {
        "id": number + 1,
        "title": title,
        "type": "timeseries",
        "datasource": SOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": WIDTH * column, "y": HEIGHT * row},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "expr": chosen(query),
                "legendFormat": legend,
                "datasource": SOURCE,
            }
            for index, (query, legend) in enumerate(queries)
        ],
    }


def bundle_table(number: int) -> dict[str, Any]:
    """Build the table of loaded bundles with their precision and engine."""
    columns = "job, digest, model, precision, runtime, instance"
    table = panel(
        number, "Loaded bundles", "none", [(f"sum by ({columns}) (sopdeploy_bundle_info)", "")]
    )
    table["type"] = "table"
    table["targets"][0] |= {"instant": True, "format": "table"}
    return table


def dashboard() -> dict[str, Any]:
    """Build the dashboard in Grafana's JSON format."""
    return {
        "uid": "sopdeploy",
        "title": "sopdeploy",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": variables()},
        "panels": [
            *(panel(number, *entry) for number, entry in enumerate(PANELS)),
            bundle_table(len(PANELS)),
        ],
    }


def rendered() -> str:
    """Build the text of `dashboard.json`."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    PAGE.write_text(rendered(), encoding="utf-8")
