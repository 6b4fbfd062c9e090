"""Create the pictures of the README: two screenshots and the chart of throughput.

    python docs/generate_pictures.py [FOLDER]      # default docs/pictures

The screenshots need Chromium. They show a network that is trained on crops of scikit-learn's two sample
photographs, sorted by what they show (about a minute). The chart takes its values from the table in
docs/benchmarks/serving.md.
"""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from markupsafe import Markup
from PIL import Image
from playwright.sync_api import sync_playwright
from sklearn.datasets import load_sample_images

import sopdeploy
from sopdeploy.html.charts import element

FOLDER = Path(__file__).parent
CHART, PREDICTION, REPORT = "throughput.svg", "prediction.png", "export-report.png"
# Photograph and region (left, top, right, bottom) that shows the class and little else.
CLASSES = {
    "dahlia": ("flower", (150, 70, 460, 375)),
    "leaves": ("flower", (0, 60, 160, 420)),
    "tower": ("china", (60, 25, 360, 400)),
    "sky": ("china", (350, 0, 640, 180)),
    "lake": ("china", (345, 215, 545, 315)),
    "trees": ("china", (320, 270, 640, 427)),
}
SIZES = (0.5, 0.75, 1.0)  # of a square crop, in shorter sides of its region
CROPS_PER_SIZE = 9
EPOCHS = 15
SHOWN = "china"  # the photograph of the prediction
SHOWN_SERVERS = ("sopdeploy", "mosec", "LitServe", "BentoML")
CAPTION = "Images per second, as a share of what the engine reaches alone"
# Engines of docs/benchmarks/serving.md, and the column of its share in a row of the first or second table.
ENGINES = {
    "simulated: 20 + 10 n ms for n images, batches of 8": (7, 1),
    "simulated: 20 + 2 n ms for n images, batches of 32": (7, 4),
    "ResNet-18 in ONNX Runtime, one CPU thread": (3, 1),
}


def photographs() -> dict[str, Image.Image]:
    """Open the sample photographs of scikit-learn, 640 x 427 pixels."""
    samples = load_sample_images()
    return {
        Path(name).stem: Image.fromarray(image)
        for name, image in zip(samples.filenames, samples.images, strict=True)
    }


def crops(region: tuple[int, int, int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield squares inside *region*, on a grid of three by three for each size."""
    left, top, right, bottom = region
    for size in SIZES:
        side = int(size * min(right - left, bottom - top))
        for index in range(CROPS_PER_SIZE):
            x = left + (right - left - side) * (index % 3) // 2
            y = top + (bottom - top - side) * (index // 3) // 2
            yield x, y, x + side, y + side


def write_photos(folder: Path) -> None:
    """Write the training images, one folder per class."""
    images = photographs()
    for label, (name, region) in CLASSES.items():
        (folder / label).mkdir(parents=True)
        for index, box in enumerate(sorted(set(crops(region)))):
            images[name].crop(box).save(folder / label / f"{index:02}.jpg", quality=95)


def trained_bundle(folder: Path) -> Path:
    """Train on the crops, then detach with proof and export with class activation maps."""
    write_photos(folder / "photos")
    run = sopdeploy.train(
        data=folder / "photos",
        recipe="photos-dsop",
        out=folder / "run",
        epochs=EPOCHS,
        preprocess={"fit": "pad"},
        progress=False,
    )
    return sopdeploy.export(run.best, folder / "bundles", detach=True, with_cam=True).path


def screenshots(bundle: Path, photo: Path, folder: Path) -> None:
    """Photograph the page of a server with a prediction, and the report of the export."""
    with (
        sopdeploy.serve(bundle, background=True, port=0) as server,
        sync_playwright() as playwright,
        playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        ) as browser,
    ):
        page = browser.new_page(viewport={"width": 1200, "height": 560})
        for _ in range(2):  # the first request also opens the connection and fills caches
            page.goto(server.url)
            page.set_input_files("#file", photo)
            page.wait_for_selector("#answer[aria-busy=false] #classes li")
            page.wait_for_selector("#map:not([hidden])")
        page.screenshot(path=folder / PREDICTION)
        page.set_viewport_size({"width": 1200, "height": 800})
        page.goto((bundle / "report.html").as_uri())
        page.screenshot(path=folder / REPORT)


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


def chart(shares: dict[str, dict[str, float]]) -> Markup:
    """Draw one bar per engine and server, full length for the throughput of the bare runtime."""
    left, full, step = 96, 400, 28
    y, shapes = 28, [element("text", CAPTION, x=16, y=28)]
    values = []
    for engine, servers in shares.items():
        percentages = {name: f"{100 * share:.0f} %" for name, share in servers.items()}
        values.append(f"{engine}: {', '.join(f'{name} {text}' for name, text in percentages.items())}")
        y += 34
        shapes.append(element("text", engine, x=left, y=y, fill="#5b6b70"))
        y += 10
        for name, share in servers.items():
            color = "#00796b" if name == "sopdeploy" else "#9fb4b8"
            shapes += [
                element("text", name, x=left - 10, y=y + 16, text_anchor="end"),
                element("rect", x=left, y=y, width=full, height=22, rx=4, fill="#eef1f2"),
                element("rect", x=left, y=y, width=full * share, height=22, rx=4, fill=color),
                element("text", percentages[name], x=left + full + 12, y=y + 16),
            ]
            y += step
    width, height = left + full + 64, y + 8
    return element(
        "svg",
        element("title", CAPTION),
        element("desc", "; ".join(values)),
        element("style", "text{font:14px sans-serif;fill:#1b2a2f}"),
        element("rect", width=width, height=height, rx=8, fill="#ffffff"),
        *shapes,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
    )


def main(folder: Path) -> None:
    """Write all pictures to *folder*."""
    measured = throughput((FOLDER / "benchmarks" / "serving.md").read_text(encoding="utf-8"))
    (folder / CHART).write_text(chart(measured) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as work:
        photo = Path(work) / f"{SHOWN}.jpg"
        photographs()[SHOWN].save(photo, quality=92)
        screenshots(trained_bundle(Path(work)), photo, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER / "pictures")
