"""The pictures of the README: created by `docs/generate_pictures.py`, small, and up to date."""

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.pages import svg_texts

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
LARGEST = 400_000  # bytes


def test_every_picture_of_the_readme_exists_and_is_small() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {(ROOT / path).resolve() for path in re.findall(r"!\[.+?\]\((\S+)\)", readme)}
    pictures = {"prediction.png", "export-report.png", "throughput.svg", "own-photos.svg"}
    assert {path.name for path in named} == pictures
    assert all(path.stat().st_size < LARGEST for path in named)


def test_the_chart_shows_the_values_of_the_serving_page() -> None:
    pytest.importorskip("playwright")
    from docs import generate_pictures

    measured = generate_pictures.throughput(
        (ROOT / "docs" / "benchmarks" / "serving.md").read_text(encoding="utf-8")
    )
    simulated = list(generate_pictures.SHOWN_SERVERS)
    assert [list(servers) for servers in measured.values()] == [simulated, simulated, simulated[:3]]
    kept = (PICTURES / generate_pictures.CHART).read_text(encoding="utf-8")
    assert svg_texts(kept) == svg_texts(generate_pictures.chart(measured))
    shares = [f"{100 * share:.0f} %" for servers in measured.values() for share in servers.values()]
    assert [text for text in svg_texts(kept) if text.endswith("%")] == shares


@pytest.mark.browser
@pytest.mark.slow
def test_the_script_creates_all_pictures_in_their_sizes(tmp_path: Path) -> None:
    from docs import generate_pictures

    generate_pictures.main(tmp_path)
    assert (tmp_path / generate_pictures.CHART).is_file()
    for name in (generate_pictures.PREDICTION, generate_pictures.REPORT):
        with Image.open(tmp_path / name) as found, Image.open(PICTURES / name) as kept:
            assert found.size == kept.size
        assert (tmp_path / name).stat().st_size < LARGEST
