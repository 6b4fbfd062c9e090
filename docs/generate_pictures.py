"""Create the pictures of the pages that the product makes, and the charts of throughput and of training.

    python docs/generate_pictures.py [FOLDER]      # default docs/pictures

The pictures of pages need Chromium. They show the default network, trained on the photographs of
examples/photos (two minutes). The charts take their values from the tables in docs/benchmarks/serving.md
and own_photos.md.
"""

import io
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from playwright.sync_api import sync_playwright

import sopdeploy

FOLDER = Path(__file__).parent
PHOTOS = FOLDER.parent / "examples" / "photos"
CHART, TRAINING = "throughput.svg", "own-photos.svg"
SHOWN = PHOTOS / "new" / "hat" / "2f96b4e8.jpg"  # the photograph of the prediction
WIDTH = 1200
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
COLORS = {  # of the tools in docs/benchmarks/own_photos.md
    "sopdeploy train": "#00796b",
    "logistic regression": "#5b6b70",
    "fastai fine_tune": "#c2571a",
    "AutoGluon, few-shot": "#2f6fb3",
}


def photograph_pages(work: Path, folder: Path) -> None:
    """Train and export in *work* as the README does, and photograph to *folder* each page that is made."""
    run = sopdeploy.train(data=PHOTOS / "clothing", out=work / "run", progress=False)
    exported = sopdeploy.export(run.best, work / "bundles", detach=True)
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        ) as browser,
    ):
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        with printed_address("serve", str(exported.path), "--port", "0") as url:
            for _ in range(2):  # the first request also opens the connection and fills caches
                page.goto(url)
                page.set_input_files("#file", SHOWN)
                page.wait_for_selector("#answer[aria-busy=false] #classes li")
            photograph(page, folder / "prediction.png", "main > .panel:not(.snippets, .proof, .card)")
        for name, path in {"report": run.out / "report.html", "export": exported.page}.items():
            page.goto(f"file://{path}")
            photograph(page, folder / f"{name}.png", "header, section:nth-of-type(-n+2)")
        photos, heap = sort_some(work)
        with printed_address("label", str(heap), "--photos", str(photos), "--port", "0") as url:
            page.goto(url)
            while page.evaluate("ask('grids').then(({ grids }) => grids.length)") < 5:
                page.wait_for_timeout(500)  # the network computes the suggestions
            page.reload()
            page.wait_for_selector("#cells img[src]")
            photograph(page, folder / "label-grid.png", "#grid")
            page.click("#one-by-one")
            photograph(page, folder / "label.png", "main > .panel")


def sort_some(work: Path) -> tuple[Path, Path]:
    """Copy two photographs of each class to a folder of classes, and the others to one heap."""
    photos, heap = work / "photos", work / "camera"
    heap.mkdir()
    for of_class in sorted((PHOTOS / "clothing").iterdir()):
        files = sorted(of_class.iterdir())
        (photos / of_class.name).mkdir(parents=True)
        for file in files[:2]:
            shutil.copy(file, photos / of_class.name)
        for file in files[2:]:
            shutil.copy(file, heap)
    return photos, heap


@contextmanager
def printed_address(*arguments: str) -> Iterator[str]:
    """Start a command that serves a page; give the address that it prints, and end it."""
    command = [sys.executable, "-m", "sopdeploy", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        lines = (line.split() for line in server.stdout or ())
        yield next(words[1] for words in lines if words[1:] and words[1].startswith("http"))
        server.terminate()


def photograph(page: Any, path: Path, selector: str) -> None:
    """Photograph *page* from its top to the end of what *selector* finds, so that nothing is cut."""
    page.wait_for_timeout(1000)  # all images are decoded
    ends = page.locator(selector).evaluate_all("all => all.map((one) => one.getBoundingClientRect().bottom)")
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": round(max(ends)) + 20}
    page.screenshot(path=path, clip=clip, full_page=True)


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


def training_chart(page: str) -> str:
    """Draw accuracy against processor seconds from the table of *page*, one line per tool."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in page.splitlines()]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes, descriptions = figure.subplots(), []
        for tool, color in COLORS.items():
            line = [
                (cells[1], float(cells[3].partition(" ")[0]), float(cells[5]))
                for cells in rows
                if cells[0] == tool and len(cells) == 6
            ]
            seconds, accuracies = [point[2] for point in line], [point[1] for point in line]
            axes.plot(seconds, accuracies, marker="o", color=color, label=tool)
            values = (f"{size} per class {accuracy:.1f} % in {cpu:.0f} s" for size, accuracy, cpu in line)
            descriptions.append(f"{tool}: {', '.join(values)}")
            style: Any = {"textcoords": "offset points", "ha": "center", "color": color}
            for size, accuracy, cpu in line:
                offset = (0, 8 if tool == "sopdeploy train" else -14)
                axes.annotate(size, (cpu, accuracy), xytext=offset, **style)
        axes.set(
            xscale="log", ylabel="accuracy in %", title="EfficientNet-Lite0 on one core: new photographs"
        )
        axes.set_xlabel("processor seconds of the training; numbers at the points: photographs per class")
        axes.grid(alpha=0.3)
        axes.legend()
        return write_svg(figure, axes.get_title(), "; ".join(descriptions))


def write_svg(figure: Figure, title: str, description: str) -> str:
    """Write *figure* as SVG whose text remains text; equal figures give equal files."""
    file = io.StringIO()
    with mpl.rc_context(STYLE):
        metadata = {"Title": title, "Description": description, "Date": None, "Creator": None}
        figure.savefig(file, format="svg", metadata=metadata)
    return "\n".join(map(str.rstrip, file.getvalue().splitlines())) + "\n"


def main(folder: Path) -> None:
    """Write all pictures to *folder*."""
    trained = (FOLDER / "benchmarks" / "own_photos.md").read_text(encoding="utf-8")
    (folder / TRAINING).write_text(training_chart(trained), encoding="utf-8")
    measured = throughput((FOLDER / "benchmarks" / "serving.md").read_text(encoding="utf-8"))
    (folder / CHART).write_text(chart(measured), encoding="utf-8")
    with tempfile.TemporaryDirectory() as work:
        photograph_pages(Path(work), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER / "pictures")
