"""Pages state measured numbers as `docs/benchmarks` has them, and limits as the code does."""

import re
from typing import Any

import pytest
import yaml

from sopdeploy import client_requests
from sopdeploy.bundle import archive, folder
from sopdeploy.evaluation import decision_fit, permission, statistics
from sopdeploy.images import limits, occlusion
from sopdeploy.models.second_order_head import HeadConfig
from sopdeploy.photos import file_checks
from sopdeploy.project import SAMPLED
from sopdeploy.training.few_shot import cache as feature_cache
from sopdeploy.training.few_shot import description, features, scaling
from sopdeploy.training.recipe import RejectionConfig
from sopdeploy_commands import demo
from sopdeploy_commands.bulk import sources
from sopdeploy_commands.bundles import verify
from sopdeploy_commands.promotion import compare
from sopdeploy_export.prove.file import FLOORS, FLOORS_BY_PRECISION
from sopdeploy_service.api import admission
from sopdeploy_service.devices import processes, supervisor
from sopdeploy_service.inference import decoders, memory_budget
from sopdeploy_service.labelling.keep import keeper
from sopdeploy_service.server import http_protocol, sockets
from sopdeploy_service.settings import Settings
from tests.docs.reading import PAGES, ROOT, module_at, name

RESULTS: Any = module_at(ROOT / "docs" / "generate_results.py")
# Written as a whole by programs, which other tests run; the changelog repeats no limit.
GENERATED = {
    f"docs/{page}.md"
    for page in ("cli", "elsewhere", "errors", "models", "benchmarks/other_photos")
}
GENERATED |= {"CHANGELOG.md", "docs/benchmarks/index.md"}
WRITTEN = [page for page in PAGES if name(page) not in GENERATED]

SETTINGS = Settings()
KUBERNETES = (ROOT / "deploy" / "kubernetes" / "sopdeploy.yaml").read_text(encoding="utf-8")
(CONTAINER,) = next(yaml.safe_load_all(KUBERNETES))["spec"]["template"]["spec"]["containers"]
LIVENESS = CONTAINER["livenessProbe"]
ALERT_FILE = ROOT / "deploy" / "helm" / "sopdeploy" / "alerts.yaml"
((_, ALERT_RULES),) = (
    one.values() for one in yaml.safe_load(ALERT_FILE.read_text("utf-8"))["groups"]
)
ALERTS = {rule["alert"]: rule for rule in ALERT_RULES if "alert" in rule}
ERRORS, UNKNOWN, SLOW = (
    float(ALERTS[f"Sopdeploy{name}"]["expr"].rpartition(">")[2])
    for name in ("Errors", "UnknownImages", "Slow")
)
RESTARTS = re.search(r"\[(\d+)m\]", ALERTS["SopdeployRestarts"]["expr"])
MIB, MEGA, PERCENT = 1 << 20, 10**6, 100
ACCEPTS = RejectionConfig().accepts
LEVEL_ERROR = PERCENT * (ACCEPTS * (1 - ACCEPTS)) ** 0.5  # of the accepted share, of one image
LEVEL, ALPHA = PERCENT * statistics.LEVEL, PERCENT * statistics.ALPHA
FROM_CODE: list[
    tuple[Any, ...]
] = [  # limits and defaults of a page, with their values in the code
    ("records {:,} of its training images", SAMPLED),
    ("hashes of up to {:,} training images", SAMPLED),
    ("{:.0f} % interval", LEVEL),
    ("{:.0f} % Wilson interval", LEVEL),
    ("at most {:.0f} times the rounding error of float32", FLOORS),
    ("({:.0f} times for reduced precision)", FLOORS_BY_PRECISION["int8"]),
    ("The tolerance is {:.0f} noise floors in float32", FLOORS),
    ("at most {:.0f} MB of each is read", sources.MAX_HEADER_BYTES / MEGA),
    ("downloaded up to {:.0f} GB only", archive.MAX_ARCHIVE_BYTES / 1e9),
    ("downloads at most {:.0f} GB", archive.MAX_ARCHIVE_BYTES / 1e9),
    ("at most {:.0f} MB for other JSON files", folder.MAX_JSON_BYTES / MEGA),
    ("above {:.0f} % of the range of the reference outputs", PERCENT * verify.WIDE),
    ("doubles from {} s to {:.0f} s", client_requests.FIRST_DELAY, client_requests.MAX_DELAY),
    ("connection takes at most {:.0f} s of the `timeout`", client_requests.CONNECT_SECONDS),
    ("was idle for {:.0f} s is not used again", client_requests.IDLE_SECONDS),
    ("{:.0f} MB and {:.0f} million pixels", limits.MAX_BYTES / MEGA, limits.MAX_PIXELS / MEGA),
    ("`/livez` fails for {} s", LIVENESS["periodSeconds"] * LIVENESS["failureThreshold"]),
    ("does not differ significantly from 1 (likelihood ratio test, {:.0f} %)", ALPHA),
    (
        "significantly loses more than twice `--tolerance` ({:.0f} points) in a class",
        permission.CLASS_TOLERANCES * permission.TOLERANCE,
    ),
    ("({:.0f} % for all classes together)", ALPHA),
    ("(McNemar, {:.0f} %)", ALPHA),
    ("one-sided, {:.0f} %)", ALPHA),
    ("attempt k has a significance level of {:.0f} % / k", ALPHA),
    ("twice the limit pass in at most {:.0f} % of cases", PERCENT * permission.OLD_ALPHA),
    ("the limit is `--tolerance` ({:.0f} points)", permission.TOLERANCE),
    ("the last {:.0f} days", compare.RECENT_DAYS),
    ("`load_timeout` and {:.0f} s more", processes.START_SECONDS),
    ("are killed {:.0f} s after `drain_seconds`", processes.LEAVE_SECONDS),
    (
        "{:.0f} points with 100 validation images, {:.1f} with 1,000",
        *(LEVEL_ERROR / count**0.5 for count in (100, 1000)),
    ),
    ("below {:.0f} %, `train` warns", PERCENT * decision_fit.MIN_RECOGNIZED),
    ("warns if it is less than {:.0f} %", PERCENT * decision_fit.MIN_RECOGNIZED),
    ("stays in use for {:.0f} s", memory_budget.ROOM_SECONDS),
    (
        "three times the size of its `model.onnx` plus {:.0f} MB",
        memory_budget.ACTIVATION_BYTES / MEGA,
    ),
    ("false for about {:.0f} % of the images", PERCENT * (1 - ACCEPTS)),
    ("takes {} times as long", occlusion.IMAGES_PER_MAP),
    ("`max_json_bytes` ({:.0f} MB)", SETTINGS.max_json_bytes / MEGA),
    ("`url_too_long` | {} bytes", http_protocol.MAX_URL_BYTES),
    ("at least `max_connections` + {}", sockets.SPARE + sockets.OTHER_FILES),
    ("{} headers, {:,} bytes", http_protocol.MAX_HEADERS, http_protocol.MAX_HEADER_BYTES),
    ("`max_body_bytes` {:.0f} MB", SETTINGS.max_body_bytes / MEGA),
    ("Above `max_body_bytes` ({:.0f} MB)", SETTINGS.max_body_bytes / MEGA),
    ("`min_body_rate` {:.0f} kB/s", SETTINGS.min_body_rate / 1000),
    ("`max_upload_bytes` {:.0f} MB", SETTINGS.max_upload_bytes / MEGA),
    ("reserved for bodies up to {:.0f} MB", admission.SMALL_BODY / MEGA),
    (
        "up to {:.0f} megapixels and {:.0f} MB, "
        "and JPEGs with one scan up to {:.0f} megapixels and {:.0f} MB | {:.0f} MiB",
        *(decoders.LIGHT_PIXELS / MEGA, decoders.LIGHT_BODY / MEGA),
        *(decoders.PROPORTIONAL_PIXELS / MEGA, decoders.PROPORTIONAL_BODY / MEGA),
        decoders.LIGHT_MEMORY / MIB,
    ),
    (
        "{} s of CPU time and {:.0f} ns per pixel for an image, and {:.0f} ns more per byte of a large JPEG",
        *(decoders.LIGHT_SECONDS, 1e9 * decoders.SECONDS_PER_PIXEL),
        1e9 * decoders.SECONDS_PER_BYTE,
    ),
    ("light children x {:.0f} MiB", (decoders.LIGHT_MEMORY + decoders.OWN_MEMORY) / MIB),
    ("(theirs + {:.0f} MiB)", decoders.OWN_MEMORY / MIB),
    ("{:.0f} MiB and more", decoders.LARGE_MEMORY / MIB),
    ("limit a pod to {}", CONTAINER["resources"]["limits"]["memory"].replace("Gi", " GiB")),
    ("or after 1 to {:.0f} s", supervisor.MAX_RESTART_DELAY_SECONDS),
    ("event loop does not run for {:.0f} s", processes.HANG_SECONDS),
    (
        "at most {} images ({:.0f} MB)",
        keeper.MAX_QUEUED_PHOTOS,
        keeper.MAX_QUEUED_PHOTO_BYTES / MEGA,
    ),
    ("at most {:.0f} GB, the least recently used", feature_cache.LIMIT_BYTES / 1e9),
    ("has more than {} times the images of the smallest", description.UNEVEN),
    (
        "The margin is so large that about {:.0f} % of the photos of other classes are predicted",
        PERCENT * scaling.TAKEN,
    ),
    (
        "{} principal components ({} in the [linear classifier",
        HeadConfig().width,
        features.WIDTH,
    ),
    (
        "More than {:.0f} % of the images are unreadable, and at least three",
        PERCENT * file_checks.MAX_DAMAGED,
    ),
    (
        "at least {:.0f} % of the new photos right, at least {:.0f} % of other things unknown, at least "
        "{:.0f} % of the digits right",
        *(PERCENT * least for least in (demo.MIN_ACCURACY, demo.MIN_REJECTED, demo.MIN_DIGITS)),
    ),
    ("more than {:.0f} % of the responses are errors of the server", PERCENT * ERRORS),
    ("spends more than {:.0f} s in a stage", SLOW),
    ("has ended three times in {} minutes", RESTARTS and RESTARTS[1]),
    ("rejected for {} minutes", ALERTS["SopdeployOverloaded"]["for"].removesuffix("m")),
    ("more than {:.0f} % of the images are unknown to a model", PERCENT * UNKNOWN),
    (
        "detects a gain of {:.0f} points in four of five cases",
        PERCENT * statistics.smallest_difference(5, 5, 100),
    ),
]


def joined(text: str) -> str:
    return " ".join(text.split())


def from_code() -> list[str]:
    return [template.format(*values) for template, *values in FROM_CODE]


@pytest.mark.parametrize("claim", [text for one in RESULTS.measured() for text in one.texts()])
def test_the_readme_states_what_was_measured(claim: str) -> None:
    assert joined(claim) in joined((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "one", RESULTS.measured_on_pages(), ids=lambda one: f"{one.page}-{one.date}"
)
def test_a_page_states_what_was_measured(one: Any) -> None:
    page = (RESULTS.FOLDER / one.page).resolve()
    assert one.command
    assert one.date
    assert [
        text
        for text in one.texts()
        if joined(text) not in joined(page.read_text(encoding="utf-8"))
    ] == []
    assert page.read_text(encoding="utf-8") == RESULTS.page_with_tables(page), "run `make docs`"
    heads = [table.partition("\n")[0] for table in one.tables]
    assert [
        head for head in heads if page.read_text(encoding="utf-8").count(head + "\n") != 1
    ] == []


def test_a_page_states_limits_as_the_code_has_them() -> None:
    text = joined("\n".join(page.read_text(encoding="utf-8") for page in WRITTEN))
    assert [limit for limit in from_code() if limit not in text] == []


def test_every_measurement_names_a_page_that_exists() -> None:
    assert [
        one.page for one in RESULTS.measured() if not (RESULTS.FOLDER / one.page).exists()
    ] == []


def test_the_table_of_measurements_is_up_to_date() -> None:
    assert RESULTS.PAGE.read_text(encoding="utf-8") == RESULTS.results_page(), "run `make docs`"
