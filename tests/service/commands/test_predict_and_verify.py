"""`predict` gives the results of HTTP; `verify` detects changed files and outputs."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from sopdeploy.bundle.manifest import to_json
from sopdeploy.bundle.signing import make_key, sign
from sopdeploy.cli.app import app
from sopdeploy.errors import BundleError, DataError, ParityError, RuntimeUnavailableError
from sopdeploy_service.commands.predict import predict_files
from sopdeploy_service.commands.verify import verify
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.settings import Settings
from tests.forged import forge

ONE_THREAD = Settings(threads=1, runtime="onnxruntime-cpu")


def test_predict_returns_every_path_in_order_with_its_error(bundle_path, jpeg, tmp_path):
    paths = [tmp_path / name for name in ("a.jpg", "b.txt", "c.jpg")]
    for path, body in zip(paths, (jpeg, b"text", jpeg), strict=True):
        path.write_bytes(body)
    first, bad, last = predict_files(bundle_path, paths, Settings(threads=1, top_k=2))
    assert [entry.image for entry in (first, bad, last)] == [str(path) for path in paths]
    assert first.classes == last.classes
    assert len(first.classes) == 2
    assert bad.error is not None
    assert (bad.error.code, bad.classes) == ("not_an_image", ())


def test_a_file_that_cannot_be_read_or_is_too_large_is_named(bundle_path, tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jpg: cannot be read"):
        predict_files(bundle_path, [tmp_path / "nothing.jpg"], ONE_THREAD)
    (tmp_path / "big").write_bytes(bytes(3000))
    (found,) = predict_files(bundle_path, [tmp_path / "big"], Settings(threads=1, max_body_bytes=2000))
    assert found.error.code == "too_large"


def test_an_image_from_a_pipe_with_a_short_adobe_segment_is_classified(bundle_path, jpeg):
    """A pipe can be read once, and Pillow alone does not open the file."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(jpeg[:2] + b"\xff\xee\x00\x07Adobe" + jpeg[2:])
    try:
        (found,) = predict_files(bundle_path, [Path(f"/dev/fd/{reading}")], ONE_THREAD)
    finally:
        os.close(reading)
    assert found.error is None


def test_verify_reports_the_files_and_the_replays_at_two_batch_sizes(bundle_path, bundle):
    report = verify(bundle_path, ONE_THREAD)
    assert (report.bundle, report.id) == (bundle_path.name, bundle.manifest.id)
    assert (report.num_files, report.device) == (12, "cpu")
    assert [(entry.batch, entry.num_images) for entry in report.replays] == [(1, 3), (3, 3)]
    for entry in report.replays:
        assert entry.deviation["logits"] <= entry.tolerance["logits"]


def replace_weight(folder: Path) -> None:
    """Move one weight of the graph by one ulp, far less than the probes' tolerance."""
    graph = onnx.load(folder / "model.onnx")
    weights = numpy_helper.to_array(graph.graph.initializer[1]).copy()
    weights.flat[0] = np.nextafter(weights.flat[0], np.float32(1))
    graph.graph.initializer[1].CopyFrom(numpy_helper.from_array(weights, graph.graph.initializer[1].name))
    (folder / "model.onnx").write_bytes(graph.SerializeToString())


def certify(any_batch: str, root: str) -> Callable[[Path], object]:
    """Change the roots in the certificate of a bundle to repeated digits."""

    def change(folder: Path) -> None:
        fields = json.loads((folder / "certificate.json").read_bytes())
        fields["roots"] = {"any_batch": any_batch * 64, "onnx": root * 64}
        (folder / "certificate.json").write_bytes(to_json(fields))

    return change


REPLACED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another weight": (replace_weight, r"model\.onnx: its graph has the root"),
    "another certified graph": (certify("1", "9"), r"certificate\.json: certifies another graph"),
    "another certified program": (certify("9", "9"), r"certificate\.json: belongs to another network"),
}


@pytest.mark.parametrize("case", REPLACED)
def test_verify_rejects_another_graph_than_the_certified_one(bundle_path, tmp_path, case):
    change, message = REPLACED[case]
    copy = Path(shutil.copytree(bundle_path, tmp_path / "copy"))
    change(copy)
    with pytest.raises(BundleError, match=message):
        verify(forge(copy), ONE_THREAD)


def test_without_onnx_verify_checks_the_hashes_and_says_that_the_root_was_not_recomputed(
    bundle_path, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = CliRunner().invoke(app, ["verify", str(bundle_path)])
    assert result.exit_code == 0, result.output
    assert "sha256 equal" in result.stdout
    assert "root was not recomputed, because onnx is not installed" in " ".join(result.stdout.split())
    copy = Path(shutil.copytree(bundle_path, tmp_path / "copy"))
    replace_weight(copy)
    with pytest.raises(BundleError, match=r"model\.onnx"):
        verify(copy, ONE_THREAD)


def test_verify_rejects_other_outputs_and_probes_that_prove_nothing(wrong_bundle_path, make_bundle, tmp_path):
    with pytest.raises(ParityError, match=r"deviates by 0\.01"):
        verify(wrong_bundle_path, ONE_THREAD)
    for number, options in enumerate(({"probes": 0}, {"output": "gate"})):
        with pytest.raises(BundleError, match=r"probes\.npz: does not probe every output"):
            verify(make_bundle(tmp_path / str(number), **options), ONE_THREAD)


def test_without_onnxruntime_the_error_says_how_to_install_it(bundle_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install \"sopdeploy\[cpu\]\""):
        verify(bundle_path, ONE_THREAD)


def test_a_start_replays_one_probe_alone_and_verify_all_of_them(make_bundle, tmp_path):
    path = make_bundle(tmp_path, probes=6)
    for settings, expected in ((ONE_THREAD, {1: 1, 4: 5}), (Settings(threads=1, max_batch=1), {1: 6})):
        loaded = load_model(path, settings)
        assert {batch: found.num_images for batch, found in loaded.replays.items()} == expected
    assert [(entry.batch, entry.num_images) for entry in verify(path, ONE_THREAD).replays] == [
        (1, 6),
        (4, 6),
    ]


def test_a_bundle_needs_a_signature_of_the_key(tmp_path: Path, make_bundle: Callable[..., Path]) -> None:
    bundle, key = make_bundle(tmp_path), tmp_path / "release.key"
    make_key(key)
    settings = Settings(threads=1, require_signature=key.with_name("release.key.pub"))
    with pytest.raises(BundleError, match="no signature at"):
        load_model(bundle, settings)
    signature = sign(bundle, key)
    assert load_model(bundle, settings).bundle.name == bundle.name
    make_key(tmp_path / "other.key")
    signature.unlink()
    sign(bundle, tmp_path / "other.key")
    with pytest.raises(BundleError, match="Key mismatch"):
        load_model(bundle, settings)
