"""Running a table: interruption, resumption, the page, and every table at the small scale."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy.errors import ConfigError
from sopdeploy.reproduction import results as measured
from sopdeploy.reproduction import small
from sopdeploy.reproduction.plan import Reproduction, plan
from sopdeploy.reproduction.results import HOURS, MILLISECONDS, SPEED
from sopdeploy.reproduction.run import reproduce
from sopdeploy.reproduction.small import STATEMENT
from sopdeploy.reproduction.tables import PrintedRow, PrintedTable, ReproduceOptions, load_tables
from sopdeploy.training.recipe import read_recipe
from sopdeploy.training.signals import TrainingStoppedError
from tests.pages import charts
from tests.sopdeploy.data.small_data import write_classes
from tests.sopdeploy.training.runs import RecordingCallback

TABLES = load_tables()

TINY = PrintedTable(
    id="tiny",
    source="A table",
    title="two networks",
    data="cifar10",
    recipe="cifar10-dsop-resnet20",
    small=("epochs=2", "model.config.depth=8", "preprocess.resize=8", "preprocess.crop=8"),
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
            facts={HOURS: 3.5, SPEED: 80.5, MILLISECONDS: 2.5, "top-1 increment": 0.36},
        ),
        PrintedRow(id="other", name="Other", cited=True, top1=10.5, counts={"params": 2.0}),
    ),
)
QUICK = ("gsop-2",)


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "IMAGES_PER_CLASS", {"train": 6, "val": 3})


def results(finished: Reproduction) -> list[list[dict[str, object]]]:
    """Return the runs without what depends on the clock and the folder."""
    timed = {"seconds", "images_per_second"}
    return [
        [
            {
                **run.model_dump(exclude={"recipe", "machine", "milliseconds"}),
                "history": [epoch.model_dump(exclude=timed) for epoch in run.history],
            }
            for run in row.runs
        ]
        for row in finished.rows
    ]


def test_an_interrupted_table_continues_and_its_page_shows_only_measured_values(tmp_path) -> None:
    whole = reproduce(TINY, ReproduceOptions(out=tmp_path / "whole", scale="small", seeds=2))
    options = ReproduceOptions(out=tmp_path / "parts", scale="small", seeds=2)
    stop = RecordingCallback(stop_at=("step", 1, 0))
    with pytest.raises(TrainingStoppedError):
        reproduce(TINY, options, callback=stop)
    assert (tmp_path / "parts/tiny-small/plain/seed-0/last.pt").is_file()
    started: list[tuple[str, int]] = []
    resumed = reproduce(TINY, options, on_run=lambda *run: started.append(run))
    assert started == [("plain", 0), ("plain", 1), ("dsop", 0), ("dsop", 1)]
    assert results(resumed) == results(whole)
    again = reproduce(TINY, options, on_run=lambda *run: started.append(run))
    assert (len(started), again) == (4, resumed)

    page = resumed.page.read_text(encoding="utf-8")
    assert STATEMENT in page
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    for row in resumed.rows[:2]:
        errors = [100 * (1 - run.history[-1].metrics.top1) for run in row.runs]  # type: ignore[union-attr]
        assert row.top1 is not None
        assert row.top1.mean == pytest.approx(sum(errors) / 2)
        assert f"{row.printed.name} {row.printed.top1:.2f} {row.top1.mean:.2f} (" in text
    assert "Other (cited) 10.50 cited: no network of the catalog" in text
    branches = resumed.rows[1].runs[0].heads
    assert set(branches) == {"main", "layer1_0", "layer2_0", "layer3_0"}
    assert re.search(r"With DSoP, layer2_0 45\.67 \d+\.\d\d 8\.90 \d+\.\d\d ", text)
    plain, dsop = (row.top1.mean for row in resumed.rows[:2] if row.top1 is not None)
    figures = resumed.rows[1].figures
    assert figures["top-1 increment"].found == pytest.approx(plain - dsop)
    for fact, printed in TINY.rows[1].facts.items():
        found = figures[fact].found
        shown = f"{found:,.0f}" if found >= 1000 else f"{found:.4g}"
        assert f"With DSoP {fact} {printed} {shown} " in text
    assert min(figures[fact].found for fact in (HOURS, SPEED, MILLISECONDS)) > 0
    for error in ("top-1", "top-5"):
        assert f"Heads of With DSoP: {error} error in % on a fixed subset of 30 held-out images." in text
    assert json.loads((resumed.page.parent / "result.json").read_text()) == resumed.summary()

    with pytest.raises(ConfigError, match=r"result\.json: the row was trained with another recipe"):
        reproduce(TINY.model_copy(update={"set": ("optimizer.momentum=0.8",)}), options)


def test_a_row_at_the_scale_of_the_paper_runs_on_the_images_that_are_given(tmp_path) -> None:
    data = tmp_path / "imagenet"
    for part, each in (("train", 8), ("val", 3)):
        write_classes(data / part, [f"n{number:08}" for number in range(3)], each)
    changes = ("epochs=1", "model.config.depth=18", "model.config.base_width=8", "preprocess.resize=32")
    options = ReproduceOptions(
        out=tmp_path / "out",
        data=data,
        rows="without",
        set=(*changes, "preprocess.crop=32", "workers=0", "batch_size=8", "threads=1"),
    )
    found = reproduce(TABLES["dsop-7"], options)
    (run,) = found.rows[0].runs
    assert (run.train_count, run.held_out_count, len(run.history)) == (24, 9, 1)
    assert "--set epochs=1; " in found.statement
    assert "24 training images instead of 1,281,167" in found.statement
    assert found.paper_scale.startswith("Run at paper scale: 1 of 1 rows. ")
    with pytest.raises(ConfigError, match="data: the small scale has its own images"):
        plan(TABLES["dsop-7"], ReproduceOptions(data=data, scale="small"))


def test_a_row_that_cannot_be_run_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(ConfigError, match="rows='other': cannot be run"):
        reproduce(TINY, ReproduceOptions(out=tmp_path / "out", scale="small", rows="other"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TABLES],
)
def test_every_table_runs_at_the_small_scale(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(small, "EPOCHS", 4 if name == "dsop-removal" else 1)
    result = CliRunner().invoke(
        app, ["reproduce", name, "--scale", "small", "--out", str(tmp_path), "--json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    trained = TABLES[name].measures == "errors"
    assert found["statement"] == (STATEMENT if trained else "")
    for row in found["rows"]:
        assert (row["status"] == "measured") == bool(row["runs"])
        assert row["status"] == "measured" or row["printed"]["cited"] or not trained
        assert trained or row["figures"]
        for run in row["runs"]:
            assert bool(run["usage"]) == row["network"].startswith(("gm", "sgmoe"))
            assert sum(run["usage"]) % run["train_count"] == 0  # every image selects equally many components
    assert Path(found["page"]).is_file()


def test_errors_over_an_option_of_the_networks_are_a_chart(tmp_path) -> None:
    """Fig. 2 and Fig. 3 of GM-SOP are charts over alpha, and over K with one curve for each N."""
    assert (TABLES["gmsop-fig2"].over, TABLES["gmsop-fig3"].over) == ("balance_weight", "chosen")
    rows = [PrintedRow(id=f"d{n}", name="", set=(f"model.config.aux_dropout={n}",)) for n in (0.0, 0.5)]
    chart = {"over": "aux_dropout", "curve": "iterations", "small": ("epochs=1", *TINY.small[1:])}
    table = TINY.model_copy(update={**chart, "rows": tuple(rows)})
    finished = reproduce(table, ReproduceOptions(out=tmp_path, scale="small"))
    drawn = charts(finished.page.read_text(encoding="utf-8"))
    assert ">iterations = 5<" in drawn["Top-1 error over aux_dropout, two networks."]


def test_layers_of_the_slides_are_timed_on_the_device_that_is_set(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(measured, "_CHANNELS", 8)
    command = ["reproduce", "slides-layers", "--out", str(tmp_path / "out"), "--set", "device=cpu", "--json"]
    found = json.loads(CliRunner().invoke(app, command).stdout)
    assert {row["status"] for row in found["rows"]} == {"timed, not trained"}
    assert min(row["figures"][name]["found"] for row in found["rows"] for name in ("FP+BP, ms", "BP, ms")) > 0
    assert "iSQRT-COV (N = 5)" in Path(found["page"]).read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="devic: unknown key"):
        reproduce(TABLES["slides-layers"], ReproduceOptions(out=tmp_path / "no", set=("devic=cpu",)))
    assert not (tmp_path / "no").exists()
    recipe = read_recipe(TABLES["slides-decomposition"].recipe, ("device=cpu",))
    for kind in ("eig", "svd", "newton-schulz"):
        assert min(measured.time_layer({"kind": kind}, recipe).values()) > 0
