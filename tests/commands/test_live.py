"""Where `promote` has recorded a live bundle, every command means it, and never a refused one."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sopdeploy.bundle.folder import follow_link, open_bundle, read_files
from sopdeploy.bundle.listing import list_bundles
from sopdeploy.bundle.live import LOG
from sopdeploy.errors import BundleError, ConfigError
from sopdeploy_commands.app import app
from sopdeploy_commands.predict import predict
from sopdeploy_commands.runs_page import RunRow, list_runs, write_runs_page
from sopdeploy_commands.verify import verify
from sopdeploy_service.inference.bundle_store import find_bundles, links_among
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.inference.model_registry import ModelRegistry
from sopdeploy_service.settings import Settings
from tests.sopdeploy.data.folders.test_folder import make
from tests.support.service import write_bundle

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
    assert measured("bundles/latest") == [middle.name]
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


# What each command does with `bundles/latest` or the folder; the name of the bundle it means.
def named_by_serve(folder: Path) -> str:
    found = find_bundles(
        [folder / "latest"], lambda _, path, manifest: read_files(path, manifest)
    )
    return found["tiny"].path.name


def named_by_predict(folder: Path) -> str:
    with pytest.raises(BundleError) as error:  # it names the bundle
        predict(folder / "latest", b"x", require_signature=folder / "no.pub")
    [named] = [path.name for path in folder.iterdir() if f"{path}: " in str(error.value)]
    return named


COMMANDS = {
    "open_bundle": lambda folder: open_bundle(folder / "latest").path.name,
    "serve": named_by_serve,
    "follow": lambda folder: links_among([folder / "latest"])[folder / "latest"].name,
    "predict": named_by_predict,
    "verify": lambda folder: verify(folder / "latest", SETTINGS).bundle,
    "the page of runs": lambda _: next(row.bundle for row in list_runs() if row.live),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_means_the_live_bundle_by_latest(
    command: str, folder: Path, versions: list[Path]
) -> None:
    record(folder, versions[1])
    record(folder, versions[2], refused=True)

    assert COMMANDS[command](folder) == versions[1].name


def test_a_refused_bundle_is_used_if_it_is_named(
    folder: Path, versions: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    record(folder, versions[0])
    record(folder, versions[2], refused=True)
    assert open_bundle(versions[2]).path == versions[2]
    assert caplog.records == []

    open_bundle(folder / "latest")
    assert versions[0].name in caplog.text


def test_latest_of_a_project_without_a_live_bundle_is_where_it_leads(
    folder: Path, versions: list[Path]
) -> None:
    record(folder, versions[0])
    other = write_bundle(folder, project="hats", exported_at=DAYS[3])
    (folder / "latest").unlink()
    (folder / "latest").symlink_to(other.name)

    assert follow_link(folder / "latest").name == other.name


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
