"""A bundle names the formats of its photographs, and a server, `predict` and `train` say what they need."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sopdeploy.base.project import Origin
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.data.folders.folder import open_folder
from sopdeploy.data.photos.file_checks import count_formats
from sopdeploy.images import limits
from sopdeploy_service.inference.loader import describe_refusals, load_bundle
from sopdeploy_service.settings import Settings
from tests.support.pictures import encoded

PICTURE = Image.radial_gradient("L").convert("RGB")
ORIGIN = Origin(
    run="photos-1", run_id="1", started="2026-01-01T10:00:00.000000Z",
    data="photos", num_images=2, num_classes=2, formats=("heic", "webp"),
)  # fmt: skip


def test_the_formats_of_photographs_are_those_of_their_bytes(tmp_path: Path) -> None:
    names = {"a.jpg": "HEIF", "b": "JPEG", "c.png": "PNG", "d.heic": "PNG"}
    for label in ("one", "two"):
        (tmp_path / label).mkdir()
        for name, kind in names.items():
            (tmp_path / label / name).write_bytes(encoded(PICTURE, kind))

    assert count_formats(open_folder(tmp_path).train) == {"heic": 2, "jpeg": 2, "png": 4}


@pytest.mark.parametrize(("is_installed", "extras"), [(True, []), (False, [".[heif]"])])
def test_a_server_says_which_photographs_of_a_bundle_it_refuses(
    is_installed, extras, bundle, monkeypatch, caplog, request
):
    limits.missing_extra.cache_clear()  # that looks once for a decoder
    request.addfinalizer(limits.missing_extra.cache_clear)
    find_spec = limits.find_spec
    monkeypatch.setattr(
        limits,
        "find_spec",
        lambda name: None if name == "pillow_heif" and not is_installed else find_spec(name),
    )
    trained = replace(bundle, manifest=bundle.manifest.model_copy(update={"origin": ORIGIN}))
    refusals = list(describe_refusals(trained))

    assert len(refusals) == len(extras)
    assert all(extra in refusal for extra, refusal in zip(extras, refusals, strict=True))
    assert list(describe_refusals(bundle)) == []  # of no known formats

    settings = Settings(threads=1, runtime="onnxruntime-cpu")
    with caplog.at_level(logging.WARNING, "sopdeploy.inference"):
        load_bundle(trained, settings).runtime.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"{trained.name}: {refusal}" for refusal in refusals
    ]


def test_a_manifest_without_formats_keeps_its_bytes_and_its_id(bundle):
    known = {key: value for key, value in ORIGIN.model_dump().items() if key != "formats"}
    fields = bundle.manifest.model_dump(mode="json", exclude_unset=True)
    earlier = Manifest.model_validate({**fields, "origin": known})

    assert b"formats" not in earlier.to_bytes()
    assert Manifest.from_bytes(earlier.to_bytes()).id == earlier.id
