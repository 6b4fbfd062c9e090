"""The statistics of models in the form of Triton's extension `statistics`, from the metrics of the server.

Counters are those of all versions of a model since its processes started: a reload keeps them.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from sopdeploy_service.inference.model import Model

# Of Triton: of `sopdeploy_inference_seconds`. Writing the response is not measured.
PARTS = {
    "success": "success",
    "fail": "fail",
    "queue": "queue",
    "compute_input": "decode",
    "compute_infer": "infer",
}


def model_statistics(page: bytes, models: Iterable[Model]) -> dict[str, Any]:
    """Build the response of `GET /v2/models/{name}/stats` from the metrics *page* of all processes.

    Durations are sums over requests in nanoseconds; `last_inference` is in milliseconds since 1970.
    """
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)  # of each process
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = sample.labels
            values[sample.name, labels.get("model", ""), labels.get("part", "")].append(sample.value)

    def of(model: Model, name: str, part: str = "") -> list[float]:
        return values[f"sopdeploy_{name}", model.name, part] or [0.0]

    return {
        "model_stats": [
            {
                "name": model.name,
                "version": model.version,
                "last_inference": round(1e3 * max(of(model, "last_inference_timestamp_seconds"))),
                "inference_count": round(sum(of(model, "batch_size_sum"))),
                "execution_count": round(sum(of(model, "batch_size_count"))),
                "inference_stats": {
                    name: {
                        "count": round(sum(of(model, "inference_seconds_count", part))),
                        "ns": round(1e9 * sum(of(model, "inference_seconds_sum", part))),
                    }
                    for name, part in PARTS.items()
                },
                "batch_stats": [],
            }
            for model in models
        ]
    }
