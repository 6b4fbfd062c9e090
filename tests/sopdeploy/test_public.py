"""The public API of the package, and what importing it loads."""

import subprocess
import sys
from pathlib import Path

import pytest

import sopdeploy


def test_all_is_sorted_and_every_name_exists() -> None:
    assert sorted(sopdeploy.__all__) == sopdeploy.__all__
    assert all(getattr(sopdeploy, name) is not None for name in sopdeploy.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'create_modl'"):
        _ = sopdeploy.create_modl


def test_every_public_function_has_a_docstring() -> None:
    functions = [getattr(sopdeploy, n) for n in sopdeploy.__all__ if n != "__version__"]
    assert all(f.__doc__ and f.__doc__[0].isupper() for f in functions)


@pytest.mark.parametrize("module", ["sopdeploy", "sopdeploy.bundle.folder", "sopdeploy.images.preprocess"])
def test_modules_of_the_server_do_not_import_torch(module: str) -> None:
    root = Path(sopdeploy.__file__).parents[1]
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_the_catalog_does_not_import_timm() -> None:
    root = Path(sopdeploy.__file__).parents[1]
    code = "import sopdeploy.models.registry, sys; sys.exit('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
