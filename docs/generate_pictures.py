"""Create the pictures of the pages that the product makes, and the chart of throughput.

    python docs/generate_pictures.py [FOLDER] [--charts]      # default docs/pictures; only the
    charts

The pictures of pages need Chromium. They show the default network, trained on the photographs
of examples/photos (two minutes). The chart takes its values from the tables in
docs/benchmarks/serving.md.
"""

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from playwright.sync_api import sync_playwright

import sopdeploy

FOLDER = Path(__file__).parent
PHOTOS = FOLDER.parent / "examples" / "photos"
CHART = "throughput.svg"
SHOWN = PHOTOS / "new" / "hat" / "2f96b4e8.jpg"  # the photograph of the prediction
WIDTH = 1200
SHOWN_SERVERS = ("sopdeploy", "mosec", "LitServe", "BentoML")
CAPTION = "Images per second, as a share of what the runtime reaches alone"
PHONE = "12 MP"  # the row of docs/benchmarks/serving.md that the last panel shows
PHONE_TITLE = "photos of 12 megapixels, decoded on two cores: images per second"
# Engines of docs/benchmarks/serving.md, and the column of its share in a row of the first or
# second table.
ENGINES = {
    "simulated: 20 + 10 n ms for n images, batches of 8": (7, 1),
    "simulated: 20 + 2 n ms for n images, batches of 32": (7, 4),
    "ResNet-18 in ONNX Runtime, one CPU thread": (3, 1),
}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sopdeploy",
    "axes.spines.right": False,
    "axes.spines.top": False,
}


def photograph_pages(work: Path, folder: Path) -> None:
    """Train and export in *work* as the README does, and photograph to *folder* each page that is made."""
    with chdir(work):  # pages show the paths as they are given
        run = sopdeploy.train(data=PHOTOS / "clothing", progress=False)
        exported = sopdeploy.export(run.best, detach=True)
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        ) as browser,
    ):
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        with printed_address("serve", str(work / exported.path), "--port", "0") as url:
            for _ in range(2):  # the first request also opens the connection and fills caches
                page.goto(url)
                page.set_input_files("#file", SHOWN)
                page.wait_for_selector("#answer[aria-busy=false] #classes li")
            photograph(
                page, folder / "prediction.png", "main > .panel:not(.snippets, .proof, .card)"
            )
        for name, path in {"report": run.out / "report.html", "export": exported.page}.items():
            page.goto((work / path).as_uri())
            photograph(page, folder / f"{name}.png", "header, section:nth-of-type(-n+2)")


@contextmanager
def printed_address(*arguments: str) -> Iterator[str]:
    """Start a command that serves a page; give the address that it prints, and end it."""
    command = [sys.executable, "-m", "sopdeploy", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        lines = (line.split() for line in server.stdout or ())
        try:
            yield next(words[1] for words in lines if words[1:] and words[1].startswith("http"))
        finally:
            server.terminate()


def photograph(page: Any, path: Path, selector: str) -> None:
    """Photograph *page* from its top to the end of what *selector* finds, so that nothing is cut."""
    page.wait_for_timeout(1000)  # all images are decoded
    ends = page.locator(selector).evaluate_all(
        "all => all.map((one) => one.getBoundingClientRect().bottom)"
    )
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": round(max(ends)) + 20}
    page.screenshot(path=path, clip=clip, full_page=True)


class Panel(NamedTuple):
    """Values by server under a *title*, with their *unit*; bars have full length for *full*."""

    title: str
    unit: str
    full: float
    values: dict[str, float]


def panels(page: str) -> list[Panel]:
    """Read the shares of the bare runtime in the tables of *page*, and images/s of the photographs `PHONE`.

    Shares are at most 100 %.
    """
    lines = (line.strip("| ").split("|") for line in page.splitlines() if line.startswith("| "))
    rows = [[cell.strip(" *") for cell in line] for line in lines]
    found = []
    for engine, (columns, column) in ENGINES.items():
        shown = [row for row in rows if row[0] in SHOWN_SERVERS and len(row) == columns]
        found.append(
            Panel(
                engine,
                " %",
                100,
                {row[0]: min(100 * float(row[column]), 100.0) for row in shown},
            )
        )
    (head,) = (row[1:4] for row in rows if row[0] == "image")
    cells = next(row[1:4] for row in rows if row[0] == PHONE)
    rates = {
        name.rpartition(" ")[2]: float(cell) for name, cell in zip(head, cells, strict=True)
    }
    return [*found, Panel(PHONE_TITLE, "", max(rates.values()), rates)]


def chart(shown: list[Panel]) -> str:
    """Draw one bar per panel and server."""
    heights = [len(panel.values) + 1 for panel in shown]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.3 * sum(heights) + 0.3), layout="constrained")
        for axes, panel in zip(
            figure.subplots(len(shown), height_ratios=heights), shown, strict=True
        ):
            colors = ["#00796b" if name == "sopdeploy" else "#9fb4b8" for name in panel.values]
            drawn = axes.barh(list(panel.values), list(panel.values.values()), color=colors)
            axes.bar_label(drawn, fmt=f"{{:.0f}}{panel.unit}", padding=4)
            axes.set_title(panel.title, loc="left", fontsize="medium", color="#5b6b70")
            axes.set(xlim=(0, 1.1 * panel.full), xticks=[])
            axes.invert_yaxis()
        figure.suptitle(CAPTION)
        texts = []
        for panel in shown:
            values = (
                f"{name} {value:.0f}{panel.unit.strip()}"
                for name, value in panel.values.items()
            )
            texts.append(f"{panel.title}: {', '.join(values)}")
        return write_svg(figure, CAPTION, "; ".join(texts))


def write_svg(figure: Figure, title: str, description: str) -> str:
    """Write *figure* as SVG whose text remains text; equal figures give equal files."""
    file = io.StringIO()
    with mpl.rc_context(STYLE):
        metadata = {"Title": title, "Description": description, "Date": None, "Creator": None}
        figure.savefig(file, format="svg", metadata=metadata)
    return "\n".join(map(str.rstrip, file.getvalue().splitlines())) + "\n"


def main(folder: Path, *, only_charts: bool) -> None:
    """Write all pictures to *folder*."""
    measured = panels((FOLDER / "benchmarks" / "serving.md").read_text(encoding="utf-8"))
    (folder / CHART).write_text(chart(measured), encoding="utf-8")
    if only_charts:
        return
    with tempfile.TemporaryDirectory() as work:
        photograph_pages(Path(work), folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER / "pictures")
    parser.add_argument("--charts", action="store_true")
    given = parser.parse_args()
    main(given.folder, only_charts=given.charts)
