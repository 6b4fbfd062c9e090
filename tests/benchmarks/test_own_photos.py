"""The chart of own photos shows the values of its page."""

from pathlib import Path

import own_photos

from tests.pages import svg_texts


def test_the_chart_of_own_photos_is_that_of_its_page() -> None:
    docs = Path(__file__).parents[2] / "docs"
    points = own_photos.read_table((docs / "benchmarks" / "own_photos.md").read_text(encoding="utf-8"))
    assert {point.tool for point in points} == {"sopdeploy", "probe", "fastai", "autogluon-svm"}
    drawn = (docs / "pictures" / "own-photos.svg").read_text(encoding="utf-8")
    texts = svg_texts(drawn)
    assert texts == svg_texts(own_photos.chart(points))
    assert {own_photos.NAMES[point.tool] for point in points} <= {*texts}
