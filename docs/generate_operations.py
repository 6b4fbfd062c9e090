"""Generate the tables of settings, metrics, statements and options of recipes, in the pages that have their marks."""

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from prometheus_client import generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from sopdeploy.data.augment import Augmentation
from sopdeploy.layers.pooling.registry import Pooling
from sopdeploy.training.settings.loop import OptimizerConfig
from sopdeploy.training.settings.recipe import AnyProcedureConfig
from sopdeploy.training.settings.schedules import Schedule
from sopdeploy_export.prove.certificate import STATEMENTS
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.observability.pages import merge_metrics
from sopdeploy_service.settings import VARIABLE_PREFIX, Settings

FOLDER = Path(__file__).parent
REFUSED = re.compile(
    r"^Refused: ([^(]*)\s\((.*)\)\.", re.MULTILINE | re.DOTALL
)  # networks, and their tests
TESTS = sorted((FOLDER.parent / "tests").rglob("test_*.py"))


def settings_table() -> str:
    """Build one table row per setting: name, default and meaning."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = (
            "not set" if field.default in (None, ()) else f"`{str(field.default).lower()}`"
        )
        if isinstance(field.default, str):
            default = f"`{field.default}`"
        rows.append(
            f"| `{name}` | {default} | {(field.description or '').replace('|', chr(92) + '|')} |"
        )
    return "\n".join(
        [
            *rows,
            "",
            f"Environment variables have the prefix `{VARIABLE_PREFIX}` and upper-case names.",
        ]
    )


OF_PROCESSES = "| `process_...` | counter, gauge |  | CPU time, memory and open files of the process, on Linux |"


def metrics_table() -> str:
    """Build one table row per metric of a server: name, type, labels and meaning."""
    metrics = Metrics()
    labels = {
        family.name: ", ".join(metric._labelnames)
        for metric in vars(metrics).values()
        if isinstance(metric, MetricWrapperBase)
        for family in metric.describe()
    }

    # As a server with several processes exports them, with a metric more.
    page = merge_metrics({"front-0": generate_latest(metrics.registry)}, b"").decode()
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for family in text_string_to_metric_families(page):
        if family.name.startswith("process_"):
            continue  # these depend on the system
        shown = f"{family.name}_total" if family.type == "counter" else family.name
        named = labels.get(family.name, "process")
        rows.append(f"| `{shown}` | {family.type} | {named} | {family.documentation} |")
    return "\n".join([*rows, OF_PROCESSES])


def statements_table() -> str:
    """Build one table row per statement of the certificate: its code, what it says, and what it refuses."""
    rows = ["| check | | what holds | refused, for example |", "|---|---|---|---|"]
    return "\n".join([*rows, *(_statement_row(*statement) for statement in STATEMENTS.items())])


def _statement_row(title: str, module: ModuleType) -> str:
    """Build the row of the statement of *module*, whose docstring names a refused network and its tests."""
    refused, tests = REFUSED.findall(module.__doc__ or "")[0]
    files = {FOLDER.parent / named for named in re.findall(r"`(tests/[\w/]+\.py)`", tests)}
    for function in re.findall(r"`(test_\w+)`", tests):
        defined = f"def {function}("
        files.add(next(file for file in TESTS if defined in file.read_text(encoding="utf-8")))
    links = ", ".join(f"[{file.name}]({_link(file)})" for file in sorted(files))
    code = _link(Path(module.__file__ or ""))
    evidence = "proved" if module.IS_PROVED else "measured"
    return f"| [{title}]({code}) | {evidence} | {module.STATEMENT} | {' '.join(refused.split())} ({links}) |"


def _link(file: Path) -> str:
    return f"../{file.relative_to(FOLDER.parent).as_posix()}"


# Tables of a recipe whose options depend on their `kind`
TABLES_WITH_KIND = {
    "optimizer": OptimizerConfig,
    "schedule": Schedule,
    "augment": Augmentation,
    "procedure": AnyProcedureConfig,
    "model.config.pooling": Pooling,
}


def options_table() -> str:
    """Build one table row per kind of a table in a recipe: its options with their defaults."""
    rows = ["| kind | options and defaults |", "|---|---|"]
    for table, union in TABLES_WITH_KIND.items():
        for config in get_args(get_args(union)[0]):
            (kind,) = get_args(config.model_fields["kind"].annotation)
            options = [
                f"`{name}`" if field.is_required() else f"`{name} = {_toml(field.default)}`"
                for name, field in config.model_fields.items()
                if name != "kind"
            ]
            if options:
                rows.append(f'| `{table}.kind = "{kind}"` | {", ".join(options)} |')
    return "\n".join(rows)


def _toml(value: Any) -> str:
    """Write a default as in a recipe; None is `null`, as after `--set`."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f"{value:.5g}" if isinstance(value, float) else json.dumps(value)


def pages() -> dict[Path, str]:
    """Read the pages and replace their tables."""
    tables = {
        "settings": settings_table(),
        "metrics": metrics_table(),
        "statements": statements_table(),
        "options": options_table(),
    }
    written = {page: page.read_text(encoding="utf-8") for page in sorted(FOLDER.glob("*.md"))}
    texts = {}
    for name, table in tables.items():
        begin, end = f"<!-- {name}: generated by `make docs` -->", f"<!-- end of {name} -->"
        (page,) = (page for page, text in written.items() if begin in text)
        head, _, rest = texts.get(page, written[page]).partition(begin)
        texts[page] = f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return texts
