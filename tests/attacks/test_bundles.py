"""Malicious and damaged bundles: `sopdeploy verify` rejects each with exit code 2 and one line."""

import copy
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result
from onnx import TensorProto
from typer.testing import CliRunner

from sopdeploy.bundle.manifest import to_json
from sopdeploy.bundle.onnx_root import read_model
from sopdeploy.errors import CertificateError
from sopdeploy_commands.app import app
from tests.support.forged import FIELDS, LABELS, forge, graph, proof_files, write_computed

SIDE = 16
PROBES = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)


def colors(factor: float = 1.0, *, output: str = "logits", cast: str = "Cast") -> bytes:
    """Build a graph from images (n, 16, 16, 3) uint8 to *factor* times their mean colors (n, 3)."""
    model = graph(
        f"""
        colors (uint8[n, {SIDE}, {SIDE}, 3] images) => (float[n, 3] {output})
        <int64[2] axes = {{1, 2}}, float factor = {{{factor}}}>
        {{
            wide = {cast} <to = 1> (images)
            color = ReduceMean <keepdims = 0> (wide, axes)
            {output} = Mul (color, factor)
        }}
        """
    )
    return bytes(model.SerializeToString())


def probes(**changes: Any) -> bytes:
    logits = PROBES.mean(axis=(1, 2)).astype(np.float32)
    arrays = {
        "images": PROBES,
        "output_logits": logits,
        "tolerance_logits": np.array(1e-3),
        **changes,
    }
    file = io.BytesIO()
    np.savez(
        file,
        allow_pickle=True,
        **{name: value for name, value in arrays.items() if value is not None},
    )
    return file.getvalue()


def write_bundle(destination: Path, factor: float) -> Path:
    model = onnx.load_model_from_string(colors(factor))
    return write_computed(destination, model, PROBES, 1e-3, preprocess=FIELDS["preprocess"])


def write_proof(folder: Path, root: str) -> None:
    for name, content in proof_files(root, 1e-3).items():
        (folder / name).write_bytes(content)


def forge_with_root(bundle: Path) -> Path:
    """Forge *bundle* with a certificate and a lineage for its current graph, if that has a root."""
    with suppress(CertificateError):
        _, root = read_model((bundle / "model.onnx").read_bytes())
        write_proof(bundle, root)
        return forge(bundle, lineage={**FIELDS["lineage"].model_dump(), "onnx_root": root})
    return forge(bundle)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles"), factor=1.0)


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / original.name))


def verify(bundle: Path) -> Result:
    return CliRunner().invoke(app, ["verify", str(bundle)])


def rejection(bundle: Path, name: str = "") -> str:
    """Verify *bundle*, which must fail with one line that contains *name*; return the line."""
    result = verify(bundle)
    assert result.exit_code == 2, result.output or repr(result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert name in result.stderr
    return result.stderr


def test_the_original_bundle_is_accepted(bundle: Path) -> None:
    result = verify(bundle)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"verified {bundle.name}" in result.stdout


def test_another_graph_with_the_right_hash_fails_the_probes(
    bundle: Path, tmp_path: Path
) -> None:
    shutil.copy(
        write_bundle(tmp_path / "others", factor=2.0) / "model.onnx", bundle / "model.onnx"
    )
    rejection(forge(bundle), "model.onnx: ")
    rejection(forge_with_root(bundle), "reference outputs")


def pickled() -> Any:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (Path("pwned"),)

    return np.array([Runs()], dtype=object)


def compressed(content: bytes) -> bytes:
    """Compress the arrays of *content*, as a bomb needs."""
    with np.load(io.BytesIO(content)) as arrays:
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
    return file.getvalue()


def overlapping(content: bytes, name: str) -> bytes:
    """Let a hundred entries of the archive, each with the *name* for its number, refer to the images."""
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive:
        images = archive.getinfo("images.npy")
        for number in range(100):
            archive.filelist.append(entry := copy.copy(images))
            entry.filename = name.format(number)
        archive._didModify = True  # type: ignore[attr-defined]
    return file.getvalue()


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "an array of pickled objects": lambda: probes(images=pickled()),
    "no images": lambda: probes(images=None),
    "text as outputs": lambda: probes(output_logits=np.full((4, 3), "x")),
    "no probe image": lambda: probes(images=np.zeros((0, SIDE, SIDE, 3), np.uint8)),
    "images of another size": lambda: probes(images=np.zeros((4, 8, 8, 3), np.uint8)),
    "more images than outputs": lambda: probes(images=np.zeros((9, SIDE, SIDE, 3), np.uint8)),
    "a number as images": lambda: probes(images=np.uint8(7)),
    "endless images without pixels": lambda: probes(images=np.zeros((10**15, 0), np.uint8)),
    "compressed arrays": lambda: compressed(probes()),
    "many names of one array": lambda: overlapping(probes(), "output_{}.npy"),
    "one array again and again": lambda: overlapping(probes(), "images.npy"),
    "one image again and again": lambda: probes(images=np.zeros((4, SIDE, SIDE, 3), np.uint8)),
    "a tolerance that the noise floor does not explain": lambda: probes(
        tolerance_logits=np.array(1e9)
    ),
    "an infinite tolerance": lambda: probes(tolerance_logits=np.array(np.inf)),
    "no number as tolerance": lambda: probes(tolerance_logits=np.array(np.nan)),
    "text": lambda: b"trust me",
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("attack", ARCHIVES)
def test_invalid_probes_with_the_right_hash_are_rejected(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (bundle / "probes.npz").write_bytes(ARCHIVES[attack]())
    assert "[unusable_bundle]" in rejection(forge(bundle), "probes")
    assert not Path("pwned").exists()


def test_few_probes_and_wide_tolerances_are_named(bundle: Path) -> None:
    few = PROBES[:3]
    changes = {"images": few, "output_logits": few.mean(axis=(1, 2)).astype(np.float32)}
    (bundle / "probes.npz").write_bytes(probes(tolerance_logits=np.array(5.0), **changes))
    (bundle / "parity.json").write_bytes(proof_files("", 5.0)["parity.json"])
    found = " ".join(verify(forge(bundle)).stdout.split())

    assert "only 3 reference images" in found
    assert "tolerance 5 " in found


GOLDEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "no examples": lambda index: index.update(examples=[]),
    "an example removed": lambda index: index["examples"].pop(),
    "many examples": lambda index: index.update(examples=index["examples"] * 9),
    "a large tolerance": lambda index: index.update(tolerance=1e9),
    "a large file": lambda index: index.update(x=" " * 16_000_001),
    "no JPEG file": lambda _: Path("golden-0.jpg").unlink(),
    "no golden.json": lambda _: None,
}


@pytest.mark.parametrize("attack", GOLDEN)
def test_missing_and_worthless_golden_examples_are_rejected(
    bundle: Path, monkeypatch, attack: str
) -> None:
    monkeypatch.chdir(bundle)
    index = json.loads(Path("golden.json").read_bytes())
    GOLDEN[attack](index)
    Path("golden.json").write_bytes(to_json(index))
    if attack == "no golden.json":
        Path("golden.json").unlink()
    rejection(forge(bundle), "golden.json: ")


GRAPHS: dict[str, Callable[[], bytes]] = {
    "random bytes": lambda: bytes(range(256)),
    "half a graph": lambda: colors()[:100],
    "an operator that does not exist": lambda: colors(cast="RunShell"),
    "another output": lambda: colors(output="other"),
    "an image of no type": lambda: colors().replace(b"\x08\x02\x12", b"\x08\x00\x12", 1),
    "weights in a file elsewhere": lambda: with_outside_weights("/etc/passwd"),
    "weights in a file above": lambda: with_outside_weights("../outside"),
}


def with_outside_weights(location: str) -> bytes:
    model = onnx.load_model_from_string(colors())
    tensor = model.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "4"}.items():
        tensor.external_data.add(key=key, value=value)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("attack", GRAPHS)
def test_invalid_graphs_with_the_right_hash_are_rejected(bundle: Path, attack: str) -> None:
    (bundle.parent / "outside").write_bytes(np.float32(1.0).tobytes())
    (bundle / "model.onnx").write_bytes(GRAPHS[attack]())
    rejection(forge_with_root(bundle), "model.onnx")


FIELDS_OF_OTHERS: dict[str, dict[str, Any]] = {
    "another opset": {"opset": 99},
    "another input size": {
        "inputs": [{"name": "images", "dtype": "uint8", "shape": [None, 64, 64, 3]}]
    },
    "another input type": {
        "inputs": [{"name": "images", "dtype": "float32", "shape": [None, 16, 16, 3]}]
    },
    "fewer classes": {"outputs": [{"name": "logits", "dtype": "float32", "shape": [None, 2]}]},
    "two outputs": {
        "outputs": [
            {"name": n, "dtype": "float32", "shape": [None, 3]} for n in ("logits", "x")
        ]
    },
    "operators that mix images": {"mixes_images": ["Softmax"]},
}


@pytest.mark.parametrize("attack", FIELDS_OF_OTHERS)
def test_a_manifest_of_another_graph_is_rejected(bundle: Path, attack: str) -> None:
    fields = FIELDS_OF_OTHERS[attack]
    if attack == "fewer classes":
        (bundle / "labels.json").write_bytes(to_json(LABELS[:2]))
    rejection(
        forge(bundle, **fields),
        "certificate.json" if "mixes_images" in fields else "model.onnx: has",
    )


def changed_json(bundle: Path, name: str, **fields: Any) -> None:
    """Set *fields* of the JSON object in the file *name* of *bundle*."""
    before = json.loads((bundle / name).read_bytes())
    (bundle / name).write_bytes(to_json({**before, **fields}))


def replace_graph_as(precision: str) -> Callable[[Path], dict[str, Any]]:
    """Return an attack: twice the graph, under its own root, in a bundle that says *precision*."""

    def attack(bundle: Path) -> dict[str, Any]:
        (bundle / "model.onnx").write_bytes(colors(2.0))
        _, root = read_model(colors(2.0))
        lineage = {
            **json.loads((bundle / "manifest.json").read_bytes())["lineage"],
            "onnx_root": root,
        }
        for name in ("parity.json", "precision.json"):
            changed_json(bundle, name, precision=precision)
        return {"lineage": lineage, "precision": precision}

    return attack


def without_branches(bundle: Path) -> dict[str, Any]:
    changed_json(bundle, "certificate.json", detached=[], removed=[])
    return {"detached": []}


# What is changed, with the right hashes of all files, and the file that the error names
CHANGED: dict[str, tuple[Callable[[Path], dict[str, Any] | None], str]] = {
    "a graph as fp16": (replace_graph_as("fp16"), "another graph"),
    "a graph as int8": (replace_graph_as("int8"), "another graph"),
    "a graph as fp32": (replace_graph_as("fp32"), "another graph"),
    "the precision": (
        lambda _: {"precision": "fp16"},
        "other files",
    ),
    "swapped labels": (
        lambda bundle: (bundle / "labels.json").write_bytes(to_json(LABELS[::-1])) and None,
        "other files",
    ),
    "another mean": (
        lambda _: {
            "preprocess": {
                **FIELDS["preprocess"].model_dump(mode="json"),
                "mean": [0.1, 0.2, 0.3],
            }
        },
        "other files",
    ),
    "one more file": (
        lambda b: (b / "x.txt").write_text("x") and None,
        "other files",
    ),
    "one file less": (lambda b: (b / "golden-0.jpg").unlink(), "other files"),
    "another proof": (
        lambda b: changed_json(b, "certificate.json", num_images=9),
        "was changed",
    ),
    "a stronger proof": (
        lambda b: changed_json(b, "certificate.json", proof="trained-detached"),
        "certificate.json: was changed",
    ),
}


@pytest.mark.parametrize("attack", CHANGED)
@pytest.mark.parametrize("has_onnx", [True, False])
def test_a_bundle_that_was_changed_after_its_certificate_is_rejected(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, attack: str, has_onnx: bool
) -> None:
    change, message = CHANGED[attack]
    fields = change(bundle) or {}
    if not has_onnx:
        monkeypatch.setitem(sys.modules, "onnx", None)
    rejection(forge(bundle, bound=False, **fields), message)


def test_a_certificate_of_one_network_cannot_say_that_three_were_compared(bundle: Path) -> None:
    fields = without_branches(bundle)
    rejection(forge(bundle, **fields), "certificate.json: was changed after the export")


def test_each_report_is_about_the_precision_in_the_manifest(bundle: Path) -> None:
    changed_json(bundle, "precision.json", precision="int8")
    rejection(
        forge(bundle), "precision.json: is about the precision int8, but the manifest says fp32"
    )


def test_numbers_and_texts_that_python_alone_reads_are_rejected(bundle: Path) -> None:
    parity, certificate = bundle / "parity.json", bundle / "certificate.json"
    before = parity.read_bytes()
    changed_json(bundle, "parity.json", floors_allowed=10**400)
    rejection(forge(bundle), "parity.json: records no rounding error")
    parity.write_bytes(before)
    certificate.write_bytes(certificate.read_bytes().replace(b"{", b'{"note": "\\ud800", ', 1))
    rejection(forge(bundle, bound=False), "certificate.json: contains no JSON object")


NAMES = ["[red]x", "[/]", "a\nb", "\x1b[31mred", "../outside", "", ":warning:"]


@pytest.mark.parametrize("name", NAMES)
def test_unsafe_model_names_are_rejected(bundle: Path, name: str) -> None:
    fields = json.loads((bundle / "manifest.json").read_bytes())
    (bundle / "manifest.json").write_bytes(to_json({**fields, "model": name}))
    assert "\x1b" not in rejection(bundle, "manifest.json: model: ")
