"""`verify_key`: only signed bundles are loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sopdeploy.bundle.signing import make_key, sign
from sopdeploy.errors import BundleError, ConfigError
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings


def test_a_bundle_needs_a_signature_of_the_key(tmp_path: Path, make_bundle: Callable[..., Path]) -> None:
    bundle, key = make_bundle(tmp_path), tmp_path / "release.key"
    make_key(key)
    settings = Settings(threads=1, verify_key=key.with_name("release.key.pub"))
    with pytest.raises(BundleError, match="no signature at"):
        load_model(bundle, settings)
    signature = sign(bundle, key)
    assert load_model(bundle, settings).bundle.name == bundle.name
    linked = tmp_path / "linked"
    linked.symlink_to(bundle)
    assert load_model(linked, settings).bundle.name == bundle.name
    make_key(tmp_path / "other.key")
    signature.unlink()
    sign(bundle, tmp_path / "other.key")
    with pytest.raises(BundleError, match="another key"):
        load_model(bundle, settings)
    with pytest.raises(ConfigError, match="no key here"):
        load_model(bundle, Settings(threads=1, verify_key=tmp_path / "none"))
