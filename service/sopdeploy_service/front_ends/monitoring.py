"""Metrics of several processes on one page."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import cast

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families


def merge(pages: Mapping[str, bytes]) -> bytes:
    """Merge the metrics *pages* of processes by name; add the label `process` and `sopdeploy_worker_up`.

    A page is empty if its process is down. A name is that of a device, or `DEVICE:NUMBER` for a front end.
    """
    up = Metric("sopdeploy_worker_up", "Whether a process that serves HTTP answers", "gauge")
    families: dict[str, Metric] = {}
    for name, page in pages.items():
        added = {"process": name}
        up.add_sample(up.name, added, float(bool(page)))
        for family in text_string_to_metric_families(page.decode()):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [
                sample._replace(labels={**sample.labels, **added}) for sample in family.samples
            ]
    pages_merged = SimpleNamespace(collect=lambda: [up, *families.values()])
    return generate_latest(cast(CollectorRegistry, pages_merged))  # which calls only `collect`
