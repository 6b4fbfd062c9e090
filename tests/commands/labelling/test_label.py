"""What `label` computes for the photographs that it shows."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sopdeploy.errors import DataError
from sopdeploy.training.few_shot import default_network
from sopdeploy_commands.labelling.label import embed_lazily, label
from sopdeploy_service.labelling.label import app
from sopdeploy_service.settings import Settings

KEPT = Path(f"{'0' * 32}.jpg")
# Whether the weights are on this machine, the photographs, and whether they get vectors
CASES = {
    "kept ones without weights": (False, [KEPT], False),
    "kept ones with weights": (True, [KEPT], True),
    "a folder without weights, which are downloaded": (False, [KEPT, Path("a.jpg")], True),
}


@pytest.mark.parametrize(("has_weights", "paths", "computes"), CASES.values(), ids=CASES)
def test_weights_are_not_downloaded_for_kept_photographs_alone(
    has_weights: bool, paths: list[Path], computes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embed(given: Sequence[Path]) -> Iterator[tuple[Path, None]]:
        yield from ((path, None) for path in given)

    monkeypatch.setattr(default_network, "has_default_weights", lambda: has_weights)
    monkeypatch.setattr(default_network, "embed_files", embed)
    assert [path for path, _ in embed_lazily(paths)] == (paths if computes else [])


def test_the_page_listens_at_the_address_of_the_options(tmp_path: Path, monkeypatch) -> None:
    seen: list[Settings] = []

    def run(_kept: object, _photos: object, settings: Settings, *_: object) -> None:
        seen.append(settings)
        raise DataError("enough")

    monkeypatch.setattr(app, "run_label_server", run)
    with pytest.raises(DataError, match="enough"):
        label(tmp_path, photos=tmp_path, host="127.0.0.2", port=8123)
    assert [(settings.host, settings.port) for settings in seen] == [("127.0.0.2", 8123)]
