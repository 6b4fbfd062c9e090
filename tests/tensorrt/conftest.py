"""A bundle of the small network in networks.py."""

from pathlib import Path

import pytest

from sopdeploy.bundle.folder import Bundle
from tests.tensorrt.networks import write


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write(tmp_path)
