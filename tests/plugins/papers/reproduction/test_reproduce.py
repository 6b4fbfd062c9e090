"""Running a table: interruption, resumption, the page, and every table with small networks."""

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from sopdeploy.errors import ConfigError
from sopdeploy.training.distributed import TrainingStoppedError
from sopdeploy_commands.app import app
from sopdeploy_papers import reproduce as reproduce_command
from sopdeploy_papers.reproduction.plan import ReproducedRow, Reproduction, plan
from sopdeploy_papers.reproduction.results import mean_error
from sopdeploy_papers.reproduction.run import reproduce
from sopdeploy_papers.reproduction.tables import (
    PrintedRow,
    PrintedTable,
    ReproduceOptions,
    load_tables,
)
from tests.plugins.papers.reproduction.small import small_table
from tests.sopdeploy.training.runs import RecordingCallback, few_digits
from tests.support.small_data import write_classes

TABLES = load_tables()

SPEED = "training, images per second"
TINY = PrintedTable(
    id="tiny",
    source="A table",
    title="two networks",
    data="cifar10",
    recipe="cifar10-dsop-resnet20",
    set=(
        *(
            'data={kind="digits"}',
            "epochs=2",
            "batch_size=32",
            "schedule.milestones=[]",
            "workers=0",
        ),
        *("model.config.depth=8", "preprocess.resize=8", "preprocess.crop=8"),
    ),
    rows=(
        PrintedRow(id="plain", name="Plain", set=("model.name=resnet20",), top1=12.34),
        PrintedRow(
            id="dsop",
            name="With DSoP",
            needs={"start.weights": "plain"},
            top1=11.98,
            top5=0.5,
            heads={"layer2": (45.67, 8.9)},
            baseline="plain",
            facts={SPEED: 80.5, "top-1 increment": 0.36},
        ),
        PrintedRow(
            id="other",
            name="Other",
            cited=True,
            missing="no network",
            top1=10.5,
            counts={"params": 2.0},
        ),
    ),
)
TRAINED = [name for name in TABLES if TABLES[name].measures == "errors"]


@functools.cache
def planned(name: str) -> tuple[ReproducedRow, ...]:
    """Plan a table at the scale of its paper: the networks of its rows are built on `meta` once."""
    return plan(TABLES[name], ReproduceOptions()).rows


@pytest.fixture(autouse=True)
def _few_images() -> Iterator[None]:
    with few_digits(every=30):
        yield


def results(finished: Reproduction) -> list[list[dict[str, object]]]:
    """Return the runs without what depends on the clock and the folder."""
    hidden: Any = {
        "recipe": True,
        "machine": True,
        "history": {"__all__": {"seconds", "images_per_second"}},
    }
    return [[run.model_dump(exclude=hidden) for run in row.runs] for row in finished.rows]


def top1(row: ReproducedRow) -> float:
    """Return the mean top-1 error of a row that has run."""
    error = mean_error(row.runs, "top1")
    assert error is not None
    return error.mean


@pytest.mark.slow
def test_an_interrupted_table_continues_and_its_page_shows_only_measured_values(
    tmp_path,
) -> None:
    whole = reproduce(TINY, ReproduceOptions(out=tmp_path / "whole", seeds=2))
    options = ReproduceOptions(out=tmp_path / "parts", seeds=2)
    stop = RecordingCallback(stop_at=("step", 1, 0))
    with pytest.raises(TrainingStoppedError):
        reproduce(TINY, options, callback=stop)

    assert (tmp_path / "parts/tiny/plain/seed-0/last.pt").is_file()
    started: list[tuple[str, int]] = []
    resumed = reproduce(TINY, options, on_run=lambda *run: started.append(run))
    assert started == [("plain", 0), ("plain", 1), ("dsop", 0), ("dsop", 1)]
    assert results(resumed) == results(whole)

    again = reproduce(TINY, options, on_run=lambda *run: started.append(run))
    assert (len(started), again) == (4, resumed)

    page = resumed.page.read_text(encoding="utf-8")
    for number in ("47 training images", "50,000", "2 runs"):
        assert number in page

    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for row in resumed.rows[:2]:
        errors = [100 * (1 - run.history[-1].metrics.top1) for run in row.runs]  # type: ignore[union-attr]
        assert top1(row) == pytest.approx(sum(errors) / 2)
        assert f"{row.printed.name} {row.printed.top1:.2f} {top1(row):.2f} (" in text

    assert "Other (cited) 10.50 cited" in text
    branches = resumed.rows[1].runs[0].heads
    assert set(branches) == {"main", "layer1_0", "layer2_0", "layer3_0"}
    assert re.search(r"With DSoP, layer2_0 45\.67 \d+\.\d\d 8\.90 \d+\.\d\d ", text)

    figures = resumed.rows[1].figures
    assert figures["top-1 increment"].found == pytest.approx(
        top1(resumed.rows[0]) - top1(resumed.rows[1])
    )

    for fact, printed in TINY.rows[1].facts.items():
        found = figures[fact].found
        shown = f"{found:,.0f}" if found >= 1000 else f"{found:.4g}"
        assert f"With DSoP {fact} {printed} {shown} " in text

    assert figures[SPEED].found > 0
    for error in ("top-1", "top-5"):
        assert f"13 validation images: {error} error" in text

    assert json.loads((resumed.page.parent / "result.json").read_text()) == resumed.summary()

    with pytest.raises(ConfigError, match=r"result\.json: "):
        reproduce(
            TINY.model_copy(update={"set": (*TINY.set, "optimizer.momentum=0.8")}), options
        )


def test_a_row_runs_on_the_images_that_are_given(tmp_path) -> None:
    data = tmp_path / "imagenet"
    for part, each in (("train", 8), ("val", 3)):
        write_classes(data / part, ["n01440764", "n01491361", "n01530575"], each)
    changes = (
        "epochs=1",
        "model.config.depth=18",
        "model.config.base_width=8",
        "preprocess.resize=32",
    )
    options = ReproduceOptions(
        out=tmp_path / "out",
        data=data,
        rows="without",
        set=(*changes, "preprocess.crop=32", "workers=0", "batch_size=8", "threads=1"),
    )
    found = reproduce(TABLES["dsop-7"], options)
    (run,) = found.rows[0].runs

    assert run.train_count == 24
    assert run.held_out_count == 9
    assert len(run.history) == 1
    assert "--set epochs=1; " in found.deviations
    assert "24 training images" in found.deviations
    assert "1,281,167" in found.deviations
    assert found.paper_scale.startswith("Run at paper scale: no. ")


def test_a_row_that_cannot_be_run_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(ConfigError, match="rows='other': "):
        reproduce(TINY, ReproduceOptions(out=tmp_path / "out", rows="other"))
    with pytest.raises(ConfigError, match=r"^set: "):
        reproduce(TINY, ReproduceOptions(out=tmp_path / "out", set=("epoch=3",)))
    assert not (tmp_path / "out").exists()


def test_data_that_are_missing_end_the_command_before_the_first_row(tmp_path) -> None:
    command = [
        "reproduce",
        "dsop-7",
        "--out",
        str(tmp_path / "out"),
        "--data",
        str(tmp_path / "missing"),
    ]

    for scale in ("paper", "small"):
        ended = CliRunner().invoke(app, [*command, "--scale", scale])
        assert ended.exit_code == 2
        assert str(tmp_path / "missing") in ended.stderr
        assert "index.html" not in ended.stderr
        assert ended.stderr.count("\n") == 1

    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("name", TRAINED)
def test_every_row_of_a_table_runs_with_a_small_network(name, tmp_path) -> None:
    found = reproduce(small_table(TABLES[name]), ReproduceOptions(out=tmp_path))

    assert found.page.is_file()
    for row in found.rows:
        assert (row.recipe is None) == bool(row.reason), row.reason
        assert row.status == ("measured" if row.recipe else row.reason)
        for run in row.runs:
            assert bool(run.usage) == row.recipe.model.name.startswith(("gm", "sgmoe"))  # type: ignore[union-attr]
            # Every image selects equally many components
            assert sum(run.usage) % run.train_count == 0


def test_tables_that_are_not_trained_show_counts_or_only_what_is_printed(tmp_path) -> None:
    for name, columns in (
        ("gsop-2", "row figure printed counted or measured"),
        ("slides-layers", "row figure printed"),
    ):
        shown = CliRunner().invoke(app, ["reproduce", name, "--out", str(tmp_path)]).stdout

        assert shown.splitlines()[0].split() == columns.split()
        assert TABLES[name].rows[0].name in (tmp_path / name / "index.html").read_text(
            encoding="utf-8"
        )


def test_a_row_that_fails_is_recorded_and_the_next_one_runs(tmp_path) -> None:
    plain, dsop, other = TINY.rows
    broken = plain.model_copy(
        update={"id": "broken", "set": (*plain.set, "start.weights=missing.pt")}
    )
    rows = (
        broken,
        dsop.model_copy(update={"needs": {"start.weights": "broken"}}),
        plain,
        other,
    )
    table = TINY.model_copy(update={"rows": rows, "set": (*TINY.set, "epochs=1")})
    found = reproduce(table, ReproduceOptions(out=tmp_path))
    status = [row.status for row in found.rows]

    assert status[0].startswith("seed 0 failed: missing.pt: ")
    assert re.fullmatch(r"seed 0 failed: .*broken/seed-0/best\.pt.*", status[1])
    assert status[2:] == ["measured", "cited: no network"]
    assert "seed 0 failed: " in found.page.read_text(encoding="utf-8")
    assert [row["status"] for row in found.summary()["rows"]] == status


def test_a_command_with_a_failed_row_ends_with_2_and_one_line(tmp_path, monkeypatch) -> None:
    broken = TINY.rows[0].model_copy(
        update={"set": (*TINY.rows[0].set, "start.weights=missing.pt")}
    )
    monkeypatch.setattr(
        reproduce_command, "find_table", lambda _: TINY.model_copy(update={"rows": (broken,)})
    )
    shown = CliRunner().invoke(app, ["reproduce", "tiny", "--out", str(tmp_path)])

    assert shown.exit_code != 0
    assert "plain: " in shown.output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slides-birds", "slides-aircraft", "slides-cars"])
def test_the_start_weights_of_fine_grained_rows_are_published(name) -> None:
    for row in planned(name):
        assert row.recipe is not None or row.reason.startswith("cited: "), row.reason

    without = TABLES[name].rows[0].model_copy(update={"set": ("model.name=dsop-resnet8",)})
    (row,) = plan(TABLES[name].model_copy(update={"rows": (without,)}), ReproduceOptions()).rows
    assert row.reason.startswith("not available: start.weights: ")


@pytest.mark.parametrize("name", ["gmsop-2", "slides-birds", "dsop-3"])
def test_the_small_scale_trains_the_same_networks_and_says_so(name, tmp_path) -> None:
    small = plan(
        TABLES[name], ReproduceOptions(scale="small", data=tmp_path, set=("epochs=30",))
    )

    for row, paper in zip(small.rows, planned(name), strict=True):
        if row.recipe is None or paper.recipe is None:
            continue
        assert row.recipe.model.name == paper.recipe.model.name
        assert row.recipe.model.config == paper.recipe.model.config
        assert row.recipe.data.model_dump(include={"kind", "path"}) == {
            "kind": "folder",
            "path": tmp_path,
        }
        assert row.recipe.preprocess.crop <= 64
        assert row.recipe.epochs == 30
        assert row.recipe.start is not None
        assert row.recipe.start.weights == "none"

    assert "--scale small" in small.deviations
