"""Write `deploy/dashboard.json`, the Grafana dashboard: `python deploy/dashboard.py`. A test compares.

Metric names come from `sopdeploy_service.observability.metrics`; docs/operations.md describes each of them.
"""

import json
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "dashboard.json"
SOURCE = {"type": "prometheus", "uid": "${source}"}
WIDTH, HEIGHT = 12, 8


def quantiles(metric: str, by: str) -> list[tuple[str, str]]:
    """Return median and p99 of the histogram *metric*, for each value of the label *by*."""
    rate = f"sum by (le, {by}) (rate({metric}_bucket[$__rate_interval]))"
    return [
        (f"histogram_quantile({share}, {rate})", f"{name} {{{{{by}}}}}")
        for name, share in (("p50", 0.5), ("p99", 0.99))
    ]


RATE = "[$__rate_interval]"
PANELS: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        "Answers per second, by status",
        "reqps",
        [(f"sum by (code) (rate(sopdeploy_requests_total{RATE}))", "{{code}}")],
    ),
    ("From request to answer", "s", quantiles("sopdeploy_request_duration_seconds", "route")),
    ("Where the time goes", "s", quantiles("sopdeploy_stage_duration_seconds", "stage")),
    (
        "Images per second",
        "ops",
        [(f"sum by (model) (rate(sopdeploy_batch_size_sum{RATE}))", "{{model}}")],
    ),
    (
        "Images in a batch, on average",
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
        "Why batches closed",
        "ops",
        [(f"sum by (reason) (rate(sopdeploy_batch_close_total{RATE}))", "{{reason}}")],
    ),
    (
        "Fast decoding, where it is on: drift and agreement",
        "percentunit",
        [
            ("sopdeploy_fast_decode_drift", "drift {{model}}"),
            ("sopdeploy_fast_decode_agreement", "agreement {{model}}"),
        ],
    ),
    ("Images that wait", "none", [("sum by (instance) (sopdeploy_queue_depth)", "{{instance}}")]),
    ("Engine at work", "percentunit", [("sopdeploy_engine_busy_ratio", "{{instance}} {{model}}")]),
    (
        "Decoders at work",
        "percentunit",
        [
            (
                f"rate(sopdeploy_decode_seconds_total{RATE}) / sopdeploy_decoders",
                "{{instance}}",
            )
        ],
    ),
    (
        "Refused, by reason",
        "ops",
        [(f"sum by (reason) (rate(sopdeploy_rejected_total{RATE}))", "{{reason}}")],
    ),
    (
        "Lost: clients gone, numbers not finite",
        "ops",
        [
            (f"sum(rate(sopdeploy_cancelled_total{RATE}))", "clients gone"),
            (f"sum by (model) (rate(sopdeploy_nonfinite_outputs_total{RATE}))", "not finite {{model}}"),
        ],
    ),
    ("Largest lag of the event loop", "s", [("sopdeploy_event_loop_lag_seconds", "{{instance}}")]),
    ("Open connections", "none", [("sopdeploy_connections", "{{instance}}")]),
    ("Bodies not yet answered", "bytes", [("sopdeploy_upload_bytes", "{{instance}}")]),
]


def panel(number: int, title: str, unit: str, queries: list[tuple[str, str]]) -> dict[str, Any]:
    """Return one graph, in the place that its *number* gives it."""
    row, column = divmod(number, 2)
    return {
        "id": number + 1,
        "title": title,
        "type": "timeseries",
        "datasource": SOURCE,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": WIDTH * column, "y": HEIGHT * row},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + place), "expr": query, "legendFormat": legend, "datasource": SOURCE}
            for place, (query, legend) in enumerate(queries)
        ],
    }


def bundles(number: int) -> dict[str, Any]:
    """Return the table of what is served, by which version and on which engine."""
    shown = "digest, model, precision, engine, instance"
    table = panel(number, "What is served", "none", [(f"sum by ({shown}) (sopdeploy_bundle_info)", "")])
    table["type"] = "table"
    table["targets"][0] |= {"instant": True, "format": "table"}
    return table


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    return {
        "uid": "sopdeploy",
        "title": "sopdeploy",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [{"name": "source", "label": "Source", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [
            *(panel(number, *entry) for number, entry in enumerate(PANELS)),
            bundles(len(PANELS)),
        ],
    }


def rendered() -> str:
    """Return the text of the file."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    PAGE.write_text(rendered(), encoding="utf-8")
