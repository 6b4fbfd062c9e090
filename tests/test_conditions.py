"""What a machine may lack: the fixtures that need it, and their markers."""

import pytest

from tests.support.rooms import ROOT


def test_every_test_of_a_conditional_fixture_has_its_marker(
    request: pytest.FixtureRequest,
) -> None:
    markers = {"chromium": "browser", "cuda_device": "gpu", "tensorrt": "tensorrt"}

    without = [
        item.nodeid
        for item in request.session.items
        for fixture, marker in markers.items()
        if fixture in getattr(item, "fixturenames", ())
        and item.get_closest_marker(marker) is None
    ]

    assert without == []


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("sync_playwright", {"tests/service/api/pages/conftest.py"}),
        ("pytest.mark.browser", set()),
        ("pytest.mark.gpu", set()),
        ("pytest.mark.tensorrt", set()),
        ("torch.cuda.is_available", {"tests/gpu/conftest.py"}),
    ],
)
def test_a_condition_stands_in_its_fixture_alone(text: str, places: set[str]) -> None:
    files = [
        path for path in (ROOT / "tests").rglob("*.py") if path.name != "test_conditions.py"
    ]

    found = {
        path.relative_to(ROOT).as_posix()
        for path in files
        if text in path.read_text(encoding="utf-8")
    }

    assert found == places
