"""Generate the table of `docs/benchmarks/index.md`, and the measured tables of other pages.

`results.toml` has the numbers that the README states, except the accuracies on other photos and
the throughputs, which come from `other_photos_again.json` and `serving_photos.json`.
`measured.toml` has the numbers of other pages.
"""

import json
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

FOLDER = Path(__file__).parent / "benchmarks"
PAGE = FOLDER / "index.md"
MACHINE = "Measured on "
PEERS = {"triton": "Triton", "mosec": "mosec"}  # other servers of `serving_photos.json`
SERVED = {  # kinds of images in `serving_photos.json`, and their names in the README
    "500 x 375": "JPEG, 500 x 375",
    "12 MP": "JPEG, 12 megapixels",
    "PNG, screenshot of 1920 x 1080": "PNG, 1920 x 1080",
}


@dataclass(frozen=True)
class Measured:
    """A measurement: its *command*, date and commit, its *values*, and the *claims* that are made of them.

    *page* describes it. A claim is a template of `str.format` for a part of a sentence: of the
    README, or, in `measured.toml`, of the page. *tables* are Markdown tables of the page, each
    with another header.
    """

    command: str
    date: str
    commit: str
    page: str
    values: dict[str, float | str] = field(default_factory=dict)
    claims: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    def texts(self) -> list[str]:
        """Return the claims with the values."""
        return [claim.format(**self.values) for claim in self.claims]

    def row(self) -> str:
        """Build the row of the table."""
        claims = "<br>".join(text.strip("| ").replace("|", "\\|") for text in self.texts())
        command = (
            f"`{self.command}`"
            if self.command.startswith(("python", "sopdeploy", "git"))
            else self.command
        )
        name = self.page.rpartition("/")[2].removesuffix(".md")
        when = f"{self.date}, {self.commit}" if self.commit else self.date
        return f"| {claims} | {command} | {when} | {f'[{name}]({self.page})' if self.page else ''} |"


def measured() -> list[Measured]:
    """Read `results.toml`, `other_photos_again.json` and `serving_photos.json`."""
    document = tomllib.loads((FOLDER / "results.toml").read_text(encoding="utf-8"))
    return [
        other_photos(),
        throughputs(),
        *(Measured(**one) for one in document["results"]),
    ]


def measured_on_pages() -> list[Measured]:
    """Read `measured.toml`, and the document that a benchmark printed."""
    document = tomllib.loads((FOLDER / "measured.toml").read_text(encoding="utf-8"))
    return [serving_photos(), *(Measured(**one) for one in document["results"])]


def page_with_tables(path: Path) -> str:
    """Read the page at *path* and replace its measured tables."""
    text = path.read_text(encoding="utf-8")
    for one in measured_on_pages():
        for table in one.tables if (FOLDER / one.page).resolve() == path.resolve() else ():
            head = re.escape(table.partition("\n")[0])
            text = re.sub(
                rf"^{head}\n(?:\|.*\n)*",
                lambda _, table=table: table.rstrip("\n") + "\n",
                text,
                flags=re.M,
            )
    return text


def other_photos() -> Measured:
    """Build the claims of the README: means over the sets that decided nothing about the classifier."""
    sets = json.loads((FOLDER / "other_photos_again.json").read_text(encoding="utf-8"))
    confirming = [one for one in sets if one["group"] == "C"]
    accuracy = fmean(one["accuracy"] for one in confirming)
    averages = fmean(one["averages accuracy"] for one in confirming)
    values: dict[str, float | str] = {
        "sets": len(confirming),
        "accuracy": accuracy,
        "least": min(one["accuracy"] for one in confirming),
        "most": max(one["accuracy"] for one in confirming),
        "gain": accuracy - averages,
        "rejected": fmean(one["new class rejected"] for one in confirming),
    }
    claims = [
        "mean of {sets} data sets | [{accuracy:.1f} % ({least:.0f} to {most:.0f})]",
        "on mean features | [{gain:.1f} points]",
        "(higher is better) | [{rejected:.1f} %]",
    ]
    command = "python benchmarks/other_photos.py --photos C/sports=TRAIN,TEST ... --unknown DIR --weights FILE"
    date = ", ".join(sorted({one["date"] for one in confirming}))
    return Measured(command, date, "", "other_photos.md", values, claims)


def throughputs() -> Measured:
    """Build the rows of the README's table of servers."""
    document = json.loads((FOLDER / "serving_photos.json").read_text(encoding="utf-8"))
    rows = {
        (row["case"], row["against"]): row
        for row in document["results"]
        if row["unit"] == "images/s"
    }
    claims = []
    for kind, name in SERVED.items():
        ours = rows[kind, next(iter(PEERS))]["ours"]
        others = [rows[kind, peer]["other"] for peer in PEERS]
        cells = [number(value, 0) for value in (ours, *others)]
        claims.append(" | ".join([f"| {name}", *cells]))
    command = "python benchmarks/serving_photos.py --peers FOLDER --peers-python PYTHON --onnx FILE --json"
    return Measured(command, document["date"], document["commit"], "serving.md", {}, claims)


def serving_photos() -> Measured:
    """Build the tables of servers by kind of photograph from the document that the benchmark printed."""
    document = json.loads((FOLDER / "serving_photos.json").read_text(encoding="utf-8"))
    machine, rows = document["machine"], document["results"]
    where = f"{machine['cores']} cores of {machine['processor']}, {machine['system']}"
    facts = [document["date"], where, str(rows[0]["runs"]), document["commit"]]
    head, cells = ["image"], {row["case"]: [row["case"]] for row in rows}
    for unit, digits, text in (("images/s", 0, "images/s"), ("cpu-ms", 1, "CPU ms per image")):
        measured = {(row["case"], row["against"]): row for row in rows if row["unit"] == unit}
        head += [f"{text}: sopdeploy", *PEERS.values()]
        for kind in cells:
            cells[kind].append(
                f"**{number(measured[kind, next(iter(PEERS))]['ours'], digits)}**"
            )
            cells[kind] += [number(measured[kind, peer]["other"], digits) for peer in PEERS]
    tables = [
        table(["date", "machine", "rounds", "commit"], [facts]),
        table(head, list(cells.values())),
    ]
    command = "python benchmarks/serving_photos.py --peers FOLDER --peers-python PYTHON --onnx FILE --json"
    return Measured(command, document["date"], document["commit"], "serving.md", {}, [], tables)


def number(value: float, digits: int) -> str:
    """Format a measured value; 0.0 and 1,380.0 have no decimals."""
    return f"{value:,.{digits}f}".removesuffix(".0")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Format a table as `measured.toml` has it."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([first, f"|{'---|' * len(head)}", *others, ""])


def results_page() -> str:
    """Read `docs/benchmarks/index.md` and replace the paragraph about the machine and the first table."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MACHINE)
    after = rest.partition("| claim |")[2].partition("\n\n")[2]
    machine = tomllib.loads((FOLDER / "results.toml").read_text(encoding="utf-8"))["machine"]
    head = "| claim | command | date, commit | page |\n|---|---|---|---|"
    rows = [one.row() for one in measured()]
    return "\n".join(
        [
            f"{before}{MACHINE}{machine}, unless the page says otherwise.",
            "",
            head,
            *rows,
            "",
            after,
        ]
    )
