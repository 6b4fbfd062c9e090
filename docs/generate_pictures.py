"""Create the pictures of the README: a screenshot and the chart of throughput.

    python docs/generate_pictures.py [FOLDER]      # default docs/pictures

The screenshot needs Chromium. It shows EfficientNet-Lite0 with ImageNet weights, trained on the photographs
in tests/real/photos (two minutes). The chart takes its values from the tables in
docs/benchmarks/serving.md.
"""

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from playwright.sync_api import sync_playwright

import sopdeploy

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.real.conftest import PHOTOS

FOLDER = Path(__file__).parent
CHART, PREDICTION = "throughput.svg", "prediction.png"
SHOWN = Path("hat", "127708b5.jpg")  # the photograph of the prediction, which is not trained on
SHOWN_SERVERS = ("sopdeploy", "mosec", "LitServe", "BentoML")
CAPTION = "Images per second, as a share of what the engine reaches alone"
# Engines of docs/benchmarks/serving.md, and the column of its share in a row of the first or second table.
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


def trained_bundle(folder: Path) -> Path:
    """Train on all photographs except `SHOWN`, and export as the README does."""
    shutil.copytree(PHOTOS, folder / "photos")
    (folder / "photos" / SHOWN).unlink()
    run = sopdeploy.train(
        data=folder / "photos",
        out=folder / "run",
        progress=False,
    )
    return sopdeploy.export(run.best, folder / "bundles", detach=True).path


def screenshot(bundle: Path, photo: Path, folder: Path) -> None:
    """Photograph the page of a server with a prediction."""
    with (
        subprocess.Popen(
            [sys.executable, "-m", "sopdeploy", "serve", str(bundle), "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
        ) as server,
        sync_playwright() as playwright,
        playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        ) as browser,
    ):
        url = next(iter(server.stdout or ())).split()[1]
        page = browser.new_page(viewport={"width": 1200, "height": 560})
        for _ in range(2):  # the first request also opens the connection and fills caches
            page.goto(url)
            page.set_input_files("#file", photo)
            page.wait_for_selector("#answer[aria-busy=false] #classes li")
        page.screenshot(path=folder / PREDICTION)
        server.terminate()


def throughput(page: str) -> dict[str, dict[str, float]]:
    """Read the shares of the bare runtime in the tables of *page*, by engine and server, at most 1."""
    lines = (line.strip("| ").split("|") for line in page.splitlines() if line.startswith("| "))
    rows = [[cell.strip(" *") for cell in line] for line in lines]
    return {
        engine: {
            row[0]: min(float(row[column]), 1.0)
            for row in rows
            if row[0] in SHOWN_SERVERS and len(row) == columns
        }
        for engine, (columns, column) in ENGINES.items()
    }


def chart(shares: dict[str, dict[str, float]]) -> str:
    """Draw one bar per engine and server, full length for the throughput of the bare runtime."""
    heights = [len(servers) + 1 for servers in shares.values()]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.3 * sum(heights) + 0.3), layout="constrained")
        panels = figure.subplots(len(shares), height_ratios=heights)
        for axes, (engine, servers) in zip(panels, shares.items(), strict=True):
            colors = ["#00796b" if name == "sopdeploy" else "#9fb4b8" for name in servers]
            drawn = axes.barh(list(servers), [100 * share for share in servers.values()], color=colors)
            axes.bar_label(drawn, fmt="{:.0f} %", padding=4)
            axes.set_title(engine, loc="left", fontsize="medium", color="#5b6b70")
            axes.set(xlim=(0, 110), xticks=[])
            axes.invert_yaxis()
        figure.suptitle(CAPTION)
        values = {
            engine: [f"{name} {share:.0%}" for name, share in shown.items()]
            for engine, shown in shares.items()
        }
        return write_svg(
            figure, CAPTION, "; ".join(f"{engine}: {', '.join(text)}" for engine, text in values.items())
        )


def write_svg(figure: Figure, title: str, description: str) -> str:
    """Write *figure* as SVG whose text remains text; equal figures give equal files."""
    file = io.StringIO()
    with mpl.rc_context(STYLE):
        metadata = {"Title": title, "Description": description, "Date": None, "Creator": None}
        figure.savefig(file, format="svg", metadata=metadata)
    return "\n".join(map(str.rstrip, file.getvalue().splitlines())) + "\n"


def main(folder: Path) -> None:
    """Write all pictures to *folder*."""
    measured = throughput((FOLDER / "benchmarks" / "serving.md").read_text(encoding="utf-8"))
    (folder / CHART).write_text(chart(measured), encoding="utf-8")
    with tempfile.TemporaryDirectory() as work:
        screenshot(trained_bundle(Path(work)), PHOTOS / SHOWN, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER / "pictures")
