"""`predict`, `eval` and `verify` give the results of HTTP; `bench` and `health`."""

import hashlib
import http.server
import json
import re
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from typer.testing import CliRunner

from sopdeploy.base.project import FolderReading, Origin, utc_now
from sopdeploy.bundle.decision import Decision
from sopdeploy.bundle.folder import read_manifest
from sopdeploy.bundle.http_api import ClassProbability
from sopdeploy.bundle.manifest import to_json
from sopdeploy.errors import (
    BundleError,
    ConfigError,
    DataError,
    ParityError,
    RuntimeUnavailableError,
)
from sopdeploy.evaluation.metrics import classification_report
from sopdeploy.images.decode import decode
from sopdeploy_commands import bench as timing
from sopdeploy_commands import scores as evaluate
from sopdeploy_commands.app import app
from sopdeploy_commands.bench import parse_batch_sizes
from sopdeploy_commands.predict import FilePrediction, predict, print_prediction
from sopdeploy_commands.scores import scores_of_bundle
from sopdeploy_commands.verify import FEW_PROBES, verify
from sopdeploy_export.capture.deployed import generated_images
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.server.sockets import bind
from sopdeploy_service.settings import Settings, load_settings
from tests.support.fake_runtime import FakeRuntime
from tests.support.forged import forge
from tests.support.runtimes import Failing
from tests.support.service import picture_bytes, write_bundle

ONE_THREAD = Settings(threads=1, runtime="onnxruntime-cpu")


def test_predict_escapes_what_a_pipe_cannot_show(bundle_path, jpeg, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    image = tmp_path / "Größe.jpg"
    image.write_bytes(jpeg)

    command = [sys.executable, "-m", "sopdeploy", "predict", str(bundle_path), str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/Gr\\xf6\\xdfe.jpg: ")


def test_predict_names_what_decoding_changed(bundle_path, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (40, 50)).save(tmp_path / "turned.jpg", exif=exif)
    (turned,) = predict(bundle_path, [tmp_path / "turned.jpg"], threads=1)

    assert turned.warnings == ("exif_rotated",)


def test_predict_returns_every_path_in_order_with_its_error(bundle_path, jpeg, tmp_path):
    paths = [tmp_path / name for name in ("a.jpg", "b.txt", "c.jpg")]
    for path, body in zip(paths, (jpeg, b"text", jpeg), strict=True):
        path.write_bytes(body)
    first, bad, last = predict(bundle_path, paths, threads=1, top_k=2)

    assert [entry.image for entry in (first, bad, last)] == [str(path) for path in paths]
    assert first.classes == last.classes
    assert len(first.classes) == 2
    assert bad.error.code == "not_an_image"
    assert bad.classes == ()
    with pytest.raises(DataError, match=r"nothing\.jpg: "):
        predict(bundle_path, tmp_path / "nothing.jpg", threads=1)

    (large,) = predict(bundle_path, paths[0], threads=1, max_body_bytes=len(jpeg) - 1)
    assert large.error.code == "too_large"


def test_predict_notices_a_missing_image_before_it_loads_the_network(
    bundle_path, jpeg, tmp_path, monkeypatch
):
    monkeypatch.setattr("sopdeploy_commands.predict.load_model", None)
    (tmp_path / "a.jpg").write_bytes(jpeg)
    (tmp_path / "folder").mkdir()

    for name, reason in {"b.jpg": "cannot be read", "folder": "holds no images"}.items():
        with pytest.raises(DataError, match=f"{name}: {reason}"):
            predict(bundle_path, [tmp_path / "a.jpg", tmp_path / name])


def test_verify_reports_the_files_and_the_replays_at_two_batch_sizes(bundle_path, bundle):
    report = verify(bundle_path, ONE_THREAD)

    assert (report.bundle, report.id) == (bundle_path.name, bundle.manifest.id)
    assert (report.num_files, report.device) == (13, "cpu")
    assert [(entry.batch, entry.num_images) for entry in report.replays] == [(1, 3), (3, 3)]
    for entry in report.replays:
        assert entry.deviation["logits"] <= entry.tolerance["logits"]


def test_verify_notes_no_lack_of_reference_images_after_an_ordinary_export() -> None:
    assert len(generated_images(64)) >= FEW_PROBES


def replace_weight(folder: Path) -> None:
    """Move one weight of the graph by one ulp, far less than the probes' tolerance."""
    graph = onnx.load(folder / "model.onnx")
    weights = numpy_helper.to_array(graph.graph.initializer[1]).copy()
    weights.flat[0] = np.nextafter(weights.flat[0], np.float32(1))
    graph.graph.initializer[1].CopyFrom(
        numpy_helper.from_array(weights, graph.graph.initializer[1].name)
    )
    (folder / "model.onnx").write_bytes(graph.SerializeToString())


def certify(any_batch: str, root: str) -> Callable[[Path], object]:
    """Change the roots in the certificate of a bundle to repeated digits."""

    def change(folder: Path) -> None:
        fields = json.loads((folder / "certificate.json").read_bytes())
        fields["roots"] = {"any_batch": any_batch * 64, "onnx": root * 64, "shipped": root * 64}
        (folder / "certificate.json").write_bytes(to_json(fields))

    return change


def state(statements: Any) -> Callable[[Path], object]:
    """Change the statements in the certificate of a bundle, and its own hash."""

    def change(folder: Path) -> None:
        fields = json.loads((folder / "certificate.json").read_bytes())
        fields["statements"] = statements
        del fields["sha256"]
        fields = {"sha256": hashlib.sha256(to_json(fields)).hexdigest(), **fields}
        (folder / "certificate.json").write_bytes(to_json(fields))

    return change


REPLACED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another weight": (replace_weight, r"model\.onnx: .*hash"),
    "another certified graph": (certify("1", "9"), r"certificate\.json: .*graph"),
    "another certified program": (certify("9", "9"), r"certificate\.json: .*network"),
    "a statement that is neither proved nor measured": (
        state({"Graph": "assumed"}),
        r"certificate\.json: .*proved",
    ),
    "statements of another type": (state("all"), r"certificate\.json: .*proved"),
}


@pytest.mark.parametrize("case", REPLACED)
def test_verify_rejects_another_graph_than_the_certified_one(bundle_path, tmp_path, case):
    change, message = REPLACED[case]
    copy = Path(shutil.copytree(bundle_path, tmp_path / "copy"))
    change(copy)

    with pytest.raises(BundleError, match=message):
        verify(forge(copy), ONE_THREAD)


def test_verify_and_predict_take_texts_and_the_runtime_of_serve(bundle_path, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    assert verify(str(bundle_path), runtime="onnxruntime-cpu") == verify(
        bundle_path, ONE_THREAD
    )
    assert predict(str(bundle_path), str(tmp_path / "a.png"), runtime="onnxruntime-cpu")[
        0
    ].classes

    for words in (
        ["verify", str(bundle_path)],
        ["predict", str(bundle_path), str(tmp_path / "a.png")],
    ):
        assert (
            CliRunner().invoke(app, [*words, "--set", "runtime=onnxruntime-cpu"]).exit_code == 0
        )
        assert "runtime" in CliRunner().invoke(app, [*words, "--set", "runtime=none"]).stderr


def test_without_onnx_verify_says_that_the_root_was_not_recomputed(
    bundle_path, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = CliRunner().invoke(app, ["verify", str(bundle_path)])
    assert result.exit_code == 0, result.output
    [graph] = [line for line in result.stdout.splitlines() if line.startswith("graph ")]
    assert graph.split()[1] == "-"  # neither a check mark nor an error
    assert "pip install onnx" in graph

    copy = Path(shutil.copytree(bundle_path, tmp_path / "copy"))
    replace_weight(copy)
    with pytest.raises(BundleError, match=r"model\.onnx"):
        verify(copy, ONE_THREAD)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeUnavailableError, match=r"\.\[cpu\]"):
        verify(bundle_path, ONE_THREAD)


def test_verify_and_bench_reject_other_outputs_and_probes_that_prove_nothing(tmp_path):
    wrong = write_bundle(tmp_path, wrong_by=0.01)

    for command in (verify, timing.bench):
        with pytest.raises(ParityError, match=r"deviates by 0\.01"):
            command(wrong, settings=ONE_THREAD)
    for number, options in enumerate(({"probes": 0}, {"output": "gate"})):
        with pytest.raises(BundleError, match=r"probes\.npz: "):
            verify(write_bundle(tmp_path / str(number), **options), ONE_THREAD)


COLORS = {
    "ant": (200, 30, 60),
    "bee": (90, 160, 30),
    "cat": (10, 90, 220),
    "dog": (200, 200, 20),
}
REST = ("eel", "fox", "gnu")


@pytest.fixture
def folder(tmp_path):
    """Two images of each of the tiny bundle's seven classes, in two formats."""
    for label in (*COLORS, *REST):
        (tmp_path / label).mkdir()
        for number, kind in enumerate(("JPEG", "PNG")):
            color = COLORS.get(label, (40 * number, 120, 200))
            body = picture_bytes(color, size=(50 + 7 * number, 40), kind=kind)
            (tmp_path / label / f"{number}.{kind.lower()}").write_bytes(body)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    return tmp_path


def test_a_bundle_and_predict_agree_exactly(bundle_path, folder) -> None:
    progress: list[tuple[int, int]] = []
    labels, scores, facts, _ = scores_of_bundle(
        bundle_path, folder, settings=ONE_THREAD, on_image=lambda *done: progress.append(done)
    )

    assert facts["bundle"] == bundle_path.name
    assert progress == [(done, 14) for done in range(1, 15)]
    paths = [path for label in labels for path in sorted((folder / label).iterdir())]
    predictions = predict(bundle_path, paths, threads=1, top_k=7)

    for one, prediction in zip(scores, predictions, strict=True):
        assert one.confidence == prediction.classes[0].probability
        assert [labels[index] for index in one.top5] == [
            c.label for c in prediction.classes[:5]
        ]


def test_a_bundle_reads_a_folder_as_its_run_did(bundle_path, folder, tmp_path) -> None:
    bundle = Path(shutil.copytree(bundle_path, tmp_path / "bundles" / bundle_path.name))
    counts = {"num_images": 14, "num_classes": 7}
    origin = Origin(
        run="1",
        run_id="1",
        started=utc_now(),
        data="photos",
        **counts,
        reading=FolderReading(classes_from=r"^\D+"),
    )
    manifest = read_manifest(bundle).model_copy(update={"origin": origin})
    (bundle / "manifest.json").write_bytes(manifest.to_bytes())
    (tmp_path / "photos").mkdir()
    for path in folder.glob("???/*.*"):
        path.rename(tmp_path / "photos" / f"{path.parent.name}{path.name}")

    labels, scores, *_ = scores_of_bundle(
        bundle, tmp_path / "photos", settings=ONE_THREAD, on_image=lambda *_: None
    )

    assert len(scores) == 14
    assert labels == (*COLORS, *REST)


def test_mirrored_scores_of_a_bundle_are_those_of_the_mean_logits(
    bundle_path, folder, monkeypatch
) -> None:
    random = np.random.default_rng(0)
    for path in folder.glob("*/*.png"):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
        path.with_name("0.jpeg").unlink()
    loaded = replace(load_model(bundle_path, ONE_THREAD), runtime=FakeRuntime(num_classes=7))
    monkeypatch.setattr(evaluate, "load_model", lambda *_: loaded)
    labels, scores, *_ = scores_of_bundle(
        bundle_path, folder, settings=ONE_THREAD, mirror=True, on_image=lambda *_: None
    )
    paths = [path for label in labels for path in sorted((folder / label).iterdir())]
    limits = {"max_bytes": ONE_THREAD.max_body_bytes, "max_pixels": ONE_THREAD.max_pixels}

    for score, path in zip(scores, paths, strict=True):
        pixels = decode(path.read_bytes(), loaded.bundle.manifest.preprocess, **limits).pixels
        alone, mirrored = loaded.runtime.run(np.stack([pixels, pixels[:, ::-1]]))["logits"]
        assert not np.array_equal(alone, mirrored)
        (_, probability), *_ = Decision().answer((alone + mirrored) / 2).ranked
        assert score.confidence == pytest.approx(probability, abs=1e-6)


def test_what_is_wrong_with_a_folder_is_named(bundle_path, folder) -> None:
    notes: list[str] = []

    def score() -> Any:
        given = {"settings": ONE_THREAD, "on_image": lambda *_: None, "log": notes.append}
        return scores_of_bundle(bundle_path, folder, **given)

    for path in (folder / "fox").iterdir():
        path.unlink()
    shutil.rmtree(folder / "gnu")
    labels, scores, *_ = score()
    [note] = notes
    assert note.startswith(f"{folder}: ")
    assert note.endswith(": fox, gnu")
    counts = {
        one.label: one.count
        for one in classification_report(labels, scores).classes
        if one.count
    }
    assert list(counts) == ["ant", "bee", "cat", "dog", "eel"]
    (folder / "eel" / "0.jpeg").write_bytes(b"text")
    with pytest.raises(DataError, match=r"eel/0\.jpeg: "):
        score()
    (folder / "cat").rename(folder / "yak")
    with pytest.raises(DataError, match=r"yak .* ant, bee"):
        score()


def test_a_bundle_is_timed_at_every_batch_size(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "BUDGET_SECONDS", 0.01)
    found = timing.bench(bundle_path, batch="1,2", settings=load_settings(threads=1))

    assert [row.batch for row in found.latencies] == [1, 2]
    assert all(row.num_runs >= timing.MIN_RUNS for row in found.latencies)
    assert (found.precision, found.threads) == ("fp32", 1)
    assert {"processor", "cores"} <= found.machine.keys()
    assert "onnxruntime" in found.versions
    assert ("openvino" in found.versions) == (find_spec("openvino") is not None)


@pytest.mark.parametrize("module", [evaluate, timing], ids=["eval", "bench"])
def test_a_runtime_that_fails_is_one_line(bundle_path, folder, monkeypatch, module) -> None:
    loaded = replace(load_model(bundle_path, ONE_THREAD), runtime=Failing({1: "oom"}))
    monkeypatch.setattr(module, "load_model", lambda *_: loaded)
    words = (
        ["bench", str(bundle_path)]
        if module is timing
        else ["eval", str(bundle_path), "--data", str(folder)]
    )
    result = CliRunner().invoke(app, words)

    assert (result.exit_code, result.stdout) == (2, "")
    assert "OutOfMemoryError" in result.stderr


def test_unsupported_batch_sizes_are_errors(bundle_path: Path) -> None:
    assert parse_batch_sizes("1, 8,8") == (1, 8)

    for text, message in (
        ("", "sizes"),
        ("1;8", "sizes"),
        ("-1", "sizes"),
        ("1234567", "sizes"),
        ("0", "takes batches of 1 to"),
        ("10000", "takes batches of 1 to"),
    ):
        with pytest.raises(ConfigError, match=message):
            timing.bench(bundle_path, batch=text, settings=load_settings(threads=1))


class Fixed(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/readyz" else 404)
        self.end_headers()
        self.wfile.write(b'{"status":"draining\\u001b[31m"}')

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def port() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), Fixed) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found.server_port
        found.shutdown()
        thread.join()


def health(*words: str) -> tuple[int, int, str]:
    """Return the exit code, the number of lines on stderr, and the lines."""
    found = CliRunner().invoke(app, ["health", *words])
    assert found.stdout == ""
    return found.exit_code, found.stderr.count("\n"), found.stderr


def test_the_exit_code_is_0_only_for_a_ready_server(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert health("--url", f"http://127.0.0.1:{port}/") == (0, 0, "")
    monkeypatch.setenv("SOPDEPLOY_PORT", str(port))
    assert health() == (0, 0, "")
    monkeypatch.setattr(Fixed, "status", 503)
    *found, said = health()
    assert found == [1, 1]
    assert "503" in said
    assert "draining" in said
    with bind("127.0.0.1", 0) as listener:
        silent = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr("sopdeploy_commands.health.TIMEOUT", 0.2)
        assert health("--url", silent)[:2] == (1, 1)
    for url in ("127.0.0.1:8000", "http://x:port", f"http://127.0.0.1:{port}/a b"):
        assert health("--url", url)[:2] == (2, 1)

    def refuse(*_: object, **__: object) -> None:
        raise ssl.SSLCertVerificationError("self-signed certificate")

    monkeypatch.setattr("http.client.HTTPSConnection.request", refuse)
    assert health("--url", "https://127.0.0.1:8000")[:2] == (1, 1)


@pytest.mark.parametrize("known", [None, True, False])
def test_a_line_of_predict_has_no_number_without_a_meaning(known, capsys) -> None:
    classes = (ClassProbability(label="ant", probability=0.9),)
    score = None if known is None else 0.2367
    print_prediction(
        FilePrediction(image="a.jpg", classes=classes, warnings=(), known=known, score=score),
        0.0123,
    )

    printed = capsys.readouterr().out
    assert re.findall(r"[\d.]+\d", printed) == ["0.9000", "12"]
    assert printed.startswith("a.jpg: ant ") is (known is not False)


def test_the_cell_that_a_class_depends_on_is_counted_from_one(capsys) -> None:
    losses = np.zeros((7, 7))
    losses[2, 4] = 0.25
    prediction = FilePrediction(
        image="a.jpg",
        classes=(ClassProbability(label="ant", probability=0.9),),
        explanation=tuple(map(tuple, losses.tolist())),
    )

    print_prediction(prediction, 0.0123)

    line = "ant depends most on row 3, column 5 of 7 x 7: without it, 0.2500 less"
    assert capsys.readouterr().out.splitlines()[1].strip() == line


def test_inspect_of_a_bundle_says_what_to_read_instead(bundle_path: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(bundle_path)])

    assert done.exit_code == 2
    assert "README.md" in done.stderr
