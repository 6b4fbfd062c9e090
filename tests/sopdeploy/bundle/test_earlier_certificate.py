"""A bundle of another version, whose certificate proves less or differently: what to do."""

import json
from pathlib import Path

import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import CERTIFICATE, to_json
from sopdeploy.bundle.onnx_root import check_certificate
from sopdeploy.errors import BundleError
from sopdeploy.version import __version__
from tests.support.forged import forge
from tests.support.service import write_bundle

# Fields that certificates of commit 67440da2 lack, and that a damaged one may lack
EARLIER = {
    "an earlier version": (("sha256", "contents", "precision"), "sha256, contents, precision"),
    "roots": (("roots",), "has no roots"),
}


@pytest.mark.parametrize("case", EARLIER)
def test_the_missing_fields_are_named(case: str, tmp_path: Path) -> None:
    names, message = EARLIER[case]
    bundle = write_bundle(tmp_path)
    fields = json.loads((bundle / CERTIFICATE).read_bytes())
    earlier = {name: value for name, value in fields.items() if name not in names}
    (bundle / CERTIFICATE).write_bytes(to_json(earlier))
    changed = forge(bundle, bound=False)

    with pytest.raises(BundleError, match=message):
        check_certificate(open_bundle(changed))


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    fields = json.loads((bundle / CERTIFICATE).read_bytes())
    fields["roots"].pop("shipped", None)
    (bundle / CERTIFICATE).write_bytes(to_json(fields))

    with pytest.raises(BundleError, match=r"roots\.shipped"):
        check_certificate(open_bundle(forge(bundle, bound=False)))


@pytest.mark.parametrize(
    ("versions", "advice"),
    [({"sopdeploy": "9.8"}, "'four-way'.* 9.8"),
     ({"sopdeploy": __version__}, "was changed")],
)  # fmt: skip
def test_a_proof_of_a_later_version_names_who_reads_it(
    versions: dict[str, str], advice: str, tmp_path: Path
) -> None:
    bundle = write_bundle(tmp_path)
    fields = json.loads((bundle / CERTIFICATE).read_bytes())
    (bundle / CERTIFICATE).write_bytes(to_json({**fields, "proof": "four-way"}))

    with pytest.raises(BundleError, match=advice):
        check_certificate(open_bundle(forge(bundle, versions=versions)))
