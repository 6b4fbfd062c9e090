"""A network of the catalog with a second-order head, and labels with markup, in the browser."""

from pathlib import Path

import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_export.report.results import Exported
from sopdeploy_export.web.site import write_site


@pytest.mark.browser
def test_a_network_of_the_catalog_replays(branched: Exported, tmp_path: Path) -> None:
    try:
        written = write_site(open_bundle(branched.path), tmp_path / "site")
    except RuntimeUnavailableError as problem:  # no npm, or no registry
        pytest.skip(str(problem))
    assert written.steps == 24
