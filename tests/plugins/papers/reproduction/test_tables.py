"""The tables of the papers as data: agreement with `describe` and with the recipes."""

import html
import json
import re
import shlex
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from sopdeploy.errors import ConfigError
from sopdeploy.models.describe import describe
from sopdeploy.models.gsop import RELEASED
from sopdeploy.models.registry import create_model, make_config
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy_commands.app import app
from sopdeploy_papers.reproduction.page import error_table, render_page
from sopdeploy_papers.reproduction.plan import ReproducedRow, Reproduction, plan, scale_down
from sopdeploy_papers.reproduction.tables import (
    DATA_SETS,
    OtherForm,
    PrintedRow,
    ReproduceOptions,
    find_table,
    load_tables,
)

TABLES = load_tables()

# Parameters (M) are printed with one digit, sometimes cut off; extra costs are differences of
# rounded figures; other counts have two digits, are multiples, or follow another convention;
# epochs are exact.
TOLERANCES = {"parameters (M)": 0.06, "parameters in training (M)": 0.06}
TOLERANCES |= {"extra GFLOPs": 0.006, "extra parameters (M)": 0.08}
RELATIVE = {"GFLOPs": 0.04, "GFLOPs in training": 0.04, "classified vector": 0.04}
# How the names of figures start
COUNTED = ("parameters", "GFLOPs", "classified vector", "extra", "epochs")
# As `published.toml` explains
NOT_REACHED = {
    ("dsop-2", "cbam", "GFLOPs"),
    ("dsop-2", "cbam", "extra GFLOPs"),
    ("gsop-5", "cbam", "GFLOPs"),
    ("gsop-5", "resnext", "GFLOPs"),
    ("gmsop-3", "gmsop-wrn36-2", "parameters in training (M)"),
    ("gmsop-readme", "gmsop-wrn36-2", "parameters in training (M)"),
    ("gmsop-readme", "resnet18", "parameters in training (M)"),
}
QUICK = ("dsop-3", "dsop-8")  # in every run; describing all networks takes minutes

FORMS = [name for name, table in TABLES.items() if table.forms]
# Table, row, and what its note says of the other form: GSoP's counts by hand
TEXT_AND_CODE = [
    ("gsop-5", "net2", "net2 58,281,640 and 6.523 G"),
    ("gsop-6", "net1", "net1 2,903,732 and 0.555 G"),
    ("gmsop-2", "gmsop", "gmsop 10,352,008 and 0.186 G"),
]


def check_note(planned: Reproduction) -> None:
    """Build what each command of the note says, for each row that it names, and compare the counts."""
    found = re.findall(
        r"([^;]+): ((?:--set (?:'[^']*'|\S+) )+)\(parameters and multiply-adds in training: ([^)]*)\)",
        planned.note,
    )
    rows = {row.printed.id: row for row in planned.rows}
    said = set()

    for _name, command, counts in found:
        changes = [word for word in shlex.split(command) if word != "--set"]
        for row, parameters, macs in re.findall(r"(\S+) ([\d,]+) and ([\d.]+) G", counts):
            recipe = read_recipe(rows[row].source, (*rows[row].overrides, *changes))
            trained = read_recipe(rows[row].source, rows[row].overrides)
            assert recipe.model != trained.model
            side = recipe.preprocess.crop
            classes = DATA_SETS[planned.table.data].classes
            counted = describe(
                recipe.model.name, image_size=side, num_classes=classes, **recipe.model.config
            ).training
            assert f"{counted.parameters:,}" == parameters
            assert f"{counted.macs / 1e9:.3f}" == macs
            said.add((row, tuple(changes)))

    assert said == {
        (row.printed.id, changes) for row in planned.rows for _, changes in row.forms
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_each_command_of_a_note_builds_the_network_that_the_note_counts(name: str) -> None:
    table = TABLES[name]
    chosen = set()
    for (
        form
    ) in table.forms:  # the first row that has it; those of all rows are in the slow test below
        for row in table.rows:
            recipe = table.recipe_of(row)
            if recipe is not None and form.changes(read_recipe(*recipe).model):
                chosen.add(row.id)
                break
        else:
            pytest.fail(f"no row has {form.name}")

    planned = plan(table, ReproduceOptions(rows=",".join(chosen)))
    assert {form for row in planned.rows for form, _ in row.forms} == {
        form.name for form in table.forms
    }

    check_note(planned)
    assert planned.summary()["note"] == planned.note
    assert html.unescape(render_page(planned)).count(planned.note[1:]) == 1


@pytest.mark.parametrize(("name", "row", "counts"), TEXT_AND_CODE)
def test_a_note_counts_the_form_of_the_text(name: str, row: str, counts: str) -> None:
    assert counts in plan(TABLES[name], ReproduceOptions(rows=row)).note


def test_gsop_is_released_with_every_option_in_which_the_code_differs() -> None:
    (row,) = TABLES["gsop-5"].select("net2")
    config = create_model_config(row, "gsop-5")
    assert {key: config[key] for key in RELEASED} == json.loads(json.dumps(RELEASED))

    other = (
        TABLES["gsop-5"].forms[0].changes(read_recipe(*TABLES["gsop-5"].recipe_of(row)).model)
    )
    assert {change.partition("=")[0] for change in other} == {
        f"model.config.{key}" for key in RELEASED
    }


def create_model_config(row: PrintedRow, table: str) -> dict[str, Any]:
    model = read_recipe(*TABLES[table].recipe_of(row)).model
    return make_config(model.name, model.config).model_dump(mode="json")


def keys(form: OtherForm) -> set[str]:
    return {change.partition("=")[0] for change in (*form.set, *form.default)}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_a_table_says_so_if_it_trains_another_form(name: str) -> None:
    """An option that is another form in one table is not set in silence in a second one."""
    silent = set()
    for row in TABLES[name].rows:
        recipe = TABLES[name].recipe_of(row)
        if recipe is None or not recipe[0]:  # only cited, or only times are printed
            continue
        try:
            model = read_recipe(*recipe).model
        except ConfigError:  # a pooling of a plug-in, which the tests switch off
            continue
        trained, text = (
            make_config(model.name, config).model_dump() for config in (model.config, {})
        )
        differing = {f"model.config.{key}" for key in text if trained[key] != text[key]}
        forms = [form for table in FORMS for form in TABLES[table].forms if form.changes(model)]
        silent |= differing & {key for form in forms for key in keys(form)}

    assert silent <= {key for form in TABLES[name].forms for key in keys(form)}


NOISY = {"noise_per": "image", "gate_widths": [256, 128], "gate_norm": True}
SECOND_ORDER = {"conv5_stride": 1, "iterations": 3}
# options of the network, images per step, learning rate, decay, epochs, milestones
TRAINING = {
    "gmsop-3/gmgap-wrn36-2": ({"gate_widths": [512]}, 256, 0.1, 5e-4, 40, (20, 30)),
    "gmsop-3/gmsop-wrn36-2": ({"gate_widths": [512, 128]}, 256, 0.09, 5e-4, 40, (20, 30, 35)),
    "slides-imagenet64/gmsop-wrn36-2": (
        {"gate_widths": [512, 128]},
        256,
        0.09,
        5e-4,
        40,
        (20, 30, 35),
    ),
    "gmsop-readme/resnet18": ({}, 256, 0.075, 1e-4, 75, (50, 65)),
    "gmsop-readme/srsop": (SECOND_ORDER, 256, 0.15, 1e-4, 60, (40, 50, 55)),
    "gmsop-readme/gmgap-resnet18": (NOISY, 256, 0.075, 1e-4, 75, (50, 65)),
    "gmsop-readme/gmgap-wrn36-2": (
        NOISY | {"gate_widths": [512]},
        150,
        0.1,
        1e-4,
        40,
        (20, 30),
    ),
    "gmsop-readme/gmsop-resnet18": (NOISY | SECOND_ORDER, 256, 0.1, 1e-4, 60, (40, 50, 55)),
    "gmsop-readme/gmsop-wrn36-2": (
        NOISY | SECOND_ORDER | {"gate_widths": [512, 128], "dropout": 0.4},
        *(150, 0.09, 1e-4, 40, (20, 30, 35)),
    ),
}


@pytest.mark.parametrize("name", TRAINING)
def test_gm_sop_is_trained_as_the_paper_prints(name: str) -> None:
    network, *schedule = TRAINING[name]
    table, row = name.split("/")
    recipe = read_recipe(*TABLES[table].recipe_of(*TABLES[table].select(row)))

    assert recipe.model.config.items() >= network.items()

    rates = recipe.optimizer.lr, recipe.optimizer.weight_decay
    assert [recipe.batch_size, *rates, recipe.epochs, recipe.schedule.milestones] == schedule


def is_counted(row: ReproducedRow, figure: str) -> bool:
    """Whether *figure* is one that the network of *row*, which is built, has without training."""
    is_built = row.recipe is not None or row.reason == "counted, not trained"
    return figure.startswith(COUNTED) and is_built


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.nightly)
        for name in TABLES
    ],
)
def test_every_row_can_be_run_and_its_counts_are_the_printed_ones(name: str) -> None:
    """Counts of networks, epochs, and the cost beyond another row's."""
    table = TABLES[name]
    planned = plan(table, ReproduceOptions())
    wrong = set()
    unexplained = []

    for row in planned.rows:
        may_lack_a_recipe = row.printed.cited or table.measures != "errors"
        assert row.recipe is not None or may_lack_a_recipe, row.reason
        assert (row.gpu_hours > 0) == (row.recipe is not None)

        for figure, (printed, found, note, _, mark) in row.figures.items():
            assert (found is not None) == is_counted(row, figure), (row.printed.id, figure)
            tolerance = TOLERANCES.get(figure, RELATIVE.get(figure, 0.0) * printed)
            if found is not None and abs(found - printed) > tolerance:
                wrong.add((name, row.printed.id, figure))
            if mark and not (note or row.printed.note):
                unexplained.append((row.printed.id, figure))

    assert wrong == {found for found in NOT_REACHED if found[0] == name}
    assert unexplained == []

    # The page has the title of the table, and the notes of all rows.
    check_note(planned)
    page = html.unescape(render_page(planned))
    assert table.title in page
    notes = [row.printed.note for row in planned.rows if row.printed.note]
    assert [note for note in notes if note not in page] == []


# Of a block, not of its shortcut or a reduction of channels
CONVOLUTION = re.compile(r"conv\d$")
LAYERS = {
    "conv1": "conv1",
    "pool1": "maxpool",
    **{f"conv{n + 1}_x": f"layer{n}" for n in (1, 2, 3, 4)},
}


def architecture(network: Any, side: int) -> dict[str, int]:
    """Return the sizes of the maps, and the counts of the first stage, to which the others are equal."""
    facts = {"blocks per stage": len(network.layer1)}

    def note(
        layer: str, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        facts.update(
            {
                f"side after {layer}": output.shape[-1],
                f"channels after {layer}": output.shape[1],
            }
        )

    for layer, attribute in LAYERS.items():
        module = getattr(network, attribute, nn.Identity())
        # The last block of a stage
        last = module[-1] if isinstance(module, nn.Sequential) else module
        last.register_forward_hook(partial(note, layer))
    with torch.no_grad():
        network.eval()(torch.empty(1, 3, side, side, device="meta"))
    branches = dict(getattr(network, "branches", nn.Module()).named_children())
    of_stage = [branch for name, branch in branches.items() if name.startswith("layer1")]
    for name, part in (("", network.layer1), (" of branches", nn.ModuleList(of_stage))):
        convolutions = [
            module for module, _ in part.named_modules() if CONVOLUTION.search(module)
        ]
        facts[f"convolutions{name} per stage"] = len(convolutions)
    return facts | {"branches": len(branches), "branches per stage": len(of_stage)}


@pytest.mark.parametrize("name", ["dsop-4", "gsop-3", "gmsop-1"])
def test_the_catalog_builds_the_maps_blocks_and_branches_that_a_table_prints(name: str) -> None:
    for row in TABLES[name].rows:
        recipe = read_recipe(*TABLES[name].recipe_of(row))
        with torch.device("meta"):
            network = create_model(recipe.model.name, **recipe.model.config)
        found = architecture(network, recipe.preprocess.crop)

        assert {fact: found[fact] for fact in row.facts} == row.facts, row.id


def test_fine_tuning_starts_from_the_network_of_another_table(tmp_path) -> None:
    options = ReproduceOptions(rows="mpncov-resnet50", out=tmp_path)

    def start_weights() -> str:
        recipe = plan(TABLES["slides-birds"], options).rows[0].recipe
        return str(recipe.start.weights)  # type: ignore[union-attr]

    assert start_weights() == "imagenet"
    best = tmp_path / "slides-imagenet/isqrt/seed-0/best.pt"
    best.parent.mkdir(parents=True)
    best.touch()
    assert start_weights() == str(best)


def test_a_dry_run_prints_commands_and_hours_and_writes_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        "reproduce",
        "dsop-3",
        "--rows",
        "two-phase",
        "--seeds",
        "2",
        "--dry-run",
        "--out",
        "out",
    ]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    planned = json.loads(result.stdout)

    assert [line["printed"]["id"] for line in planned["rows"]] == ["resnet50-s1", "two-phase"]

    second = planned["rows"][1]
    command, *options = second["commands"][1].split(" --")
    assert command == "sopdeploy train"
    assert options == [
        "recipe imagenet-dsop-two-phase",
        "set start.weights=out/dsop-3/resnet50-s1/seed-1/best.pt",
        "set seed=1",
        "out out/dsop-3/two-phase/seed-1",
    ]

    macs = describe("dsop-resnet50", aux_stride="table", conv5_stride=1).training.macs
    assert second["gpu_hours"] == pytest.approx(
        6 * macs * DATA_SETS["imagenet"].images * 15 / 20e12 / 3600, rel=0.02
    )
    assert planned["gpu_hours"] == pytest.approx(
        2 * sum(line["gpu_hours"] for line in planned["rows"])
    )

    named = ["reproduce", "dsop-9a", "--rows", "sgd", "--data", "2024", "--dry-run"]
    shown = re.sub(r"\s+", " ", CliRunner().invoke(app, named).stdout)
    assert "--set 'data.path=\"2024\"' " in shown
    assert "0.027 GPU hours" in shown
    assert "torchrun --nproc-per-node 8 " in shown
    assert "--recipe cifar10-dsop-resnet20 " in shown
    assert list(tmp_path.iterdir()) == []


def test_a_small_batch_has_a_rate_in_proportion() -> None:
    paper = read_recipe("cifar10-dsop-resnet20")
    small = read_recipe("cifar10-dsop-resnet20", scale_down(paper, Path("photos")))
    assert small.batch_size != paper.batch_size

    rate = paper.optimizer.lr / paper.batch_size
    assert small.optimizer.lr / small.batch_size == pytest.approx(rate)


def test_both_errors_that_are_printed_stand_beside_those_that_were_measured() -> None:
    printed = PrintedRow(id="a", name="a", top1=20.0, top5=5.0)
    metrics = SimpleNamespace(top1=0.75, top5=0.9)
    run: Any = SimpleNamespace(history=[SimpleNamespace(metrics=metrics)], held_out_count=100)
    paper = next(table for table in load_tables().values() if not table.accuracy)
    table = error_table(paper, [ReproducedRow(printed=printed, runs=[run])])

    _, *errors, status = table.rows[0]
    assert [error.split(" ")[0] for error in errors] == ["20.00", "25.00", "5.00", "10.00"]
    assert status == "measured"


def test_unknown_tables_and_rows_are_named_with_their_neighbors() -> None:
    with pytest.raises(ConfigError, match=r"'dsop-12': .*dsop-"):
        find_table("dsop-12")
    with pytest.raises(ConfigError, match=r"rows='sdg': .* sgd"):
        plan(TABLES["dsop-9a"], ReproduceOptions(rows="sdg"))
