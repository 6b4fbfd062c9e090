"""`latest` is the newest bundle and `live` the promoted one in every command; a folder serves the live one."""

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sopdeploy.bundle.folder import follow_link, open_bundle, read_files
from sopdeploy.bundle.listing import list_bundles
from sopdeploy.bundle.live import LOG
from sopdeploy.errors import BundleError, ConfigError
from sopdeploy_commands.app import app
from sopdeploy_commands.compare import compare
from sopdeploy_commands.evaluate import evaluate
from sopdeploy_commands.predict import predict
from sopdeploy_commands.runs_page import RunRow, list_runs, write_runs_page
from sopdeploy_commands.verify import verify
from sopdeploy_service.inference.bundle_store import find_bundles, links_among
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.inference.model_registry import ModelRegistry
from sopdeploy_service.settings import Settings
from tests.sopdeploy.data.folders.test_folder import make
from tests.support.service import LABELS, write_bundle

DAYS = [f"2026-11-2{day}T10:00:00.000000Z" for day in range(4)]
SETTINGS = Settings(threads=1)


def record(folder: Path, after: Path, *, refused: bool = False, link: str = "live") -> None:
    """Write what `promote` writes, as far as others read it; move the link unless *refused*."""
    with (folder / LOG).open("a") as log:
        log.write(json.dumps({"link": link, "after": after.name, "refused": refused}) + "\n")
    if not refused:
        (folder / link).unlink(missing_ok=True)
        (folder / link).symlink_to(after.name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "bundles"


@pytest.fixture
def versions(folder: Path) -> list[Path]:
    """Three exports of one project, the oldest first; `latest` leads to the last one."""
    return [
        write_bundle(folder, exported_at=DAYS[day], probes=day + 3, seed=day)
        for day in range(3)
    ]


def served(folder: Path) -> list[str]:
    return [listed.path.name for listed in list_bundles(folder) if listed.is_served]


def why(folder: Path) -> dict[str, str]:
    return {listed.path.name: listed.why_not_served for listed in list_bundles(folder)}


def test_the_live_bundle_is_served_whatever_was_exported_or_refused_later(
    folder: Path, versions: list[Path]
) -> None:
    oldest, middle, newest = versions
    assert served(folder) == [newest.name]

    record(folder, middle)
    record(folder, newest, refused=True)
    assert served(folder) == [middle.name]
    assert why(folder) == {
        newest.name: "refused by promote",
        middle.name: "",
        oldest.name: f"exported earlier, {DAYS[0][:19]}Z",
    }

    record(folder, oldest)  # as `promote --back`
    assert oldest.name in why(folder)[middle.name]

    (folder / "live").unlink()  # a copy of the folder may lack links
    assert served(folder) == [oldest.name]

    record(folder, newest)  # later photographs showed that it is good
    assert served(folder) == [newest.name]

    (folder / "live").unlink()
    (folder / "live").symlink_to(middle.name)  # by hand
    assert served(folder) == [middle.name]


def test_eval_names_the_bundle_that_it_measured(folder: Path, versions: list[Path]) -> None:
    make(folder.parent / "photos", ant=1, bee=1)
    oldest, middle, newest = versions

    def measured(source: str) -> list[str]:
        words = ["eval", source, "--data", "photos"]
        printed = CliRunner().invoke(app, words).stdout.splitlines()[0]
        found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["bundle"]
        return [path.name for path in versions if path.name in printed and path.name == found]

    assert measured("bundles/latest") == [newest.name]
    record(folder, middle)
    assert measured("bundles/latest") == [newest.name]
    assert measured("bundles/live") == [middle.name]
    assert measured(f"bundles/{oldest.name}") == [oldest.name]


def test_of_two_links_the_last_promoted_bundle_is_served(
    folder: Path, versions: list[Path]
) -> None:
    record(folder, versions[1], link="live")
    record(folder, versions[0], link="canary")

    assert served(folder) == [versions[0].name]


def test_another_bundle_is_not_served_if_the_live_one_is_damaged(
    folder: Path, versions: list[Path]
) -> None:
    record(folder, versions[1])
    (versions[1] / "probes.npz").unlink()

    assert served(folder) == []
    with pytest.raises(BundleError, match=versions[1].name):
        find_bundles([folder], lambda _, path, manifest: read_files(path, manifest))


def test_other_projects_of_the_folder_are_served_as_before(
    folder: Path, versions: list[Path]
) -> None:
    other = write_bundle(folder, project="hats", exported_at=DAYS[3])
    record(folder, versions[0])

    assert set(served(folder)) == {other.name, versions[0].name}


# What each command does with a link; the name of the bundle it means.
def named_by_serve(link: Path) -> str:
    found = find_bundles([link], lambda _, path, manifest: read_files(path, manifest))
    return found["tiny"].path.name


def named_by_predict(link: Path) -> str:
    with pytest.raises(BundleError) as error:  # it names the bundle
        predict(link, b"x", require_signature=link.parent / "no.pub")
    [named] = [path.name for path in link.parent.iterdir() if f"{path}: " in str(error.value)]
    return named


def write_labelled(folder: Path) -> Path:
    for number, label in enumerate(LABELS * 10):
        (folder / label).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(noise).save(folder / label / f"{number}.png")
    return folder


def named_by_compare(link: Path) -> str:
    photos = write_labelled(link.parent.parent / "photos")
    return compare(link, link, photos).second.bundle


def named_by_eval(link: Path) -> str:
    evaluation = evaluate(link, write_labelled(link.parent.parent / "photos"))
    assert Path(evaluation.source).name == evaluation.facts["bundle"]
    return evaluation.facts["bundle"]


COMMANDS = {
    "open_bundle": lambda link: open_bundle(link).path.name,
    "serve": named_by_serve,
    "follow": lambda link: links_among([link])[link].name,
    "predict": named_by_predict,
    "verify": lambda link: verify(link, SETTINGS).bundle,
    "compare": named_by_compare,
    "eval": named_by_eval,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_means_the_newest_bundle_by_latest_and_the_live_one_by_live(
    command: str, folder: Path, versions: list[Path]
) -> None:
    record(folder, versions[1])
    record(folder, versions[2], refused=True)

    assert COMMANDS[command](folder / "latest") == versions[2].name
    assert COMMANDS[command](folder / "live") == versions[1].name


def test_serve_warns_of_a_newest_bundle_that_is_not_live(
    folder: Path, versions: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    named_by_serve(folder / "latest")  # nothing is live
    record(folder, versions[2])
    named_by_serve(folder / "latest")
    assert caplog.records == []

    record(folder, versions[0])
    for name, warns in {"latest": True, "live": False, versions[2].name: False}.items():
        caplog.clear()
        named_by_serve(folder / name)
        assert bool(caplog.records) == warns


def test_a_link_to_a_link_leads_to_the_bundle(folder: Path, versions: list[Path]) -> None:
    (folder / "live").symlink_to("latest")
    assert follow_link(folder / "live").name == versions[2].name
    assert follow_link(versions[0]) == versions[0]
    assert follow_link(folder / "missing") == folder / "missing"


def test_runs_show_what_is_live_refused_and_newest(folder: Path, versions: list[Path]) -> None:
    def states() -> dict[str, RunRow]:
        return {row.bundle: row for row in list_runs()}

    record(folder, versions[0])
    record(folder, versions[2], refused=True)
    rows = states()
    assert [rows[path.name].live for path in versions] == [True, False, False]
    assert [rows[path.name].newest for path in versions] == [False, False, True]
    assert rows[versions[2].name].problem == "refused by promote"


def test_the_page_of_runs_lists_every_bundle(folder: Path, versions: list[Path]) -> None:
    Path("runs").mkdir()
    write_runs_page()
    page = Path("runs/index.html").read_text("utf-8")

    assert all(path.name in page for path in versions)


def test_a_reload_never_changes_the_project(
    folder: Path, versions: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    other = write_bundle(folder, project="hats", exported_at=DAYS[3])
    latest = folder / "latest"

    async def scenario() -> None:
        registry = ModelRegistry({"tiny": load_model(versions[0], SETTINGS)}, SETTINGS)
        await registry.start()
        for source in (latest, f"tiny={latest}"):
            latest.unlink()
            latest.symlink_to(other.name)
            await registry.reload([source])
            assert [model.bundle.path for model in registry.models()] == [versions[0]]
            assert other.name in caplog.text
            caplog.clear()
        latest.unlink()
        latest.symlink_to(versions[2].name)
        await registry.reload([latest])
        assert [model.bundle.path for model in registry.models()] == [versions[2]]
        await registry.stop()

    asyncio.run(scenario())


def test_a_log_that_cannot_be_read_is_an_error_unless_torn(
    folder: Path, versions: list[Path]
) -> None:
    record(folder, versions[0])
    with (folder / LOG).open("a") as log:
        log.write('{"link": "li')

    assert served(folder) == [versions[0].name]

    (folder / LOG).unlink()
    (folder / LOG).mkdir()
    with pytest.raises(ConfigError, match=LOG):
        list_bundles(folder)

    shutil.rmtree(folder / LOG)
