"""A graph whose weights do not fit into its file: they are in a second file, which every reader checks."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from sopdeploy.base.files import GRAPH, GRAPH_DATA
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.onnx_root import (
    check_graph_and_certificate,
    read_external,
    weights_beside,
)
from sopdeploy.bundle.sealed import SealedFile
from sopdeploy.errors import (
    BundleError,
    LoweringError,
    NoMemoryError,
    RuntimeUnavailableError,
)
from sopdeploy_commands.app import app
from sopdeploy_commands.engine_builder.build import cast_images_first, parse_and_build
from sopdeploy_commands.verify import verify
from sopdeploy_export.admit import network as admission
from sopdeploy_export.lower import to_onnx
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pack.results import Exported
from sopdeploy_export.triton import Model, write_triton
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.runtime.openvino import OpenVINORuntime
from sopdeploy_service.runtime.tensorrt_cache import Profile, key_fields
from sopdeploy_service.runtime.tensorrt_session import Gpu
from sopdeploy_service.settings import Settings
from tests.export.user_network.networks import PREPROCESS, SIDE, export_small
from tests.support.gpu_graphs import ABSENT, WORKSPACE, real_tensorrt

LIMIT = 10_000  # bytes of weights in a graph, instead of 2 GB
IMAGES = np.random.default_rng(7).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 63), nn.ReLU(), nn.Linear(63, 4)
    ).eval()


def write_photos(folder: Path) -> Path:
    """Write ten photos of each class below *folder*; return where they are."""
    random = np.random.default_rng(1)
    photos = folder / "photos"
    for name in "abcd":
        (photos / name).mkdir(parents=True)
        for number in range(10):
            pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / name / f"{number}.png")
    return photos


@pytest.fixture(scope="module")
def small_limit() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "MAX_GRAPH_BYTES", LIMIT)
        yield


@pytest.fixture(scope="module")
def exported(small_limit: None, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_small(wide(), tmp_path_factory.mktemp("bundles"), plain=wide)


@pytest.fixture
def path(exported: Exported, tmp_path: Path) -> Path:
    return Path(copytree(exported.path, tmp_path / exported.path.name))


def test_an_export_writes_the_large_weights_beside_the_graph(exported: Exported) -> None:
    files = exported.manifest.graph_files
    assert list(files) == [GRAPH, GRAPH_DATA]
    assert files[GRAPH].bytes < LIMIT
    assert exported.parity.file_bytes == sum(file.bytes for file in files.values())

    verified = verify(exported.path, runtime="onnxruntime-cpu")
    assert verified.onnx_root == exported.certificate.roots.onnx

    # Another program reads the file as the ONNX format says.
    onnx.checker.check_model(exported.path / GRAPH, full_check=True)


def test_the_graph_hash_is_that_of_a_graph_with_its_weights_inside(
    exported: Exported, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "MAX_GRAPH_BYTES", 10**9)
        whole = export_small(wide(), tmp_path, plain=wide)

    assert list(whole.manifest.graph_files) == [GRAPH]
    assert whole.certificate.roots == exported.certificate.roots


@pytest.mark.slow
def test_a_reduced_precision_has_a_file_of_its_own_weights(
    small_limit: None, exported: Exported, tmp_path: Path
) -> None:
    options = ExportOptions(precision="fp16", evaluate=write_photos(tmp_path))
    half = export_small(wide(), tmp_path, plain=wide, options=options)
    accuracy = half.precision.accuracy
    assert accuracy is not None
    assert accuracy.num_agreeing == accuracy.num_images == 40

    files = half.manifest.graph_files
    assert files[GRAPH_DATA].bytes == exported.manifest.graph_files[GRAPH_DATA].bytes // 2
    assert half.certificate.roots.onnx == exported.certificate.roots.onnx
    assert verify(half.path, runtime="onnxruntime-cpu").replays
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_weights_without_a_folder_for_their_file_are_refused(small_limit: None) -> None:
    model = to_onnx.ir.Model(
        to_onnx.ir.Graph([], [], nodes=[], opset_imports={"": 18}), ir_version=8
    )
    with pytest.raises(LoweringError, match="GB"):
        to_onnx._move_weights(model, None, LIMIT)


def test_int8_is_refused_above_the_limit_of_one_file() -> None:
    limit = admission.MAX_GRAPH_BYTES
    assert admission.check_size(limit, "int8") == ()
    with pytest.raises(LoweringError, match=r"2\.13 GB"):
        admission.check_size(limit + 1, "int8")


def test_a_graph_that_its_constants_make_too_large_for_int8_is_refused(
    small_limit: None, tmp_path: Path
) -> None:
    """The first check counts the weights of the network, here against the limit of 2 GB."""
    options = ExportOptions(precision="int8", calibrate=write_photos(tmp_path))
    with pytest.raises(LoweringError, match="precision fp16"):
        export_small(wide(), tmp_path, plain=wide, options=options)


def test_an_export_tells_first_that_the_memory_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = admission.weight_bytes(wide(), ())
    needed = admission.memory_of_export(weights)

    # It may suffice: a warning.
    monkeypatch.setattr(admission, "memory_limit", lambda: needed - 1)
    exported = export_small(wide(), tmp_path, plain=wide)
    (warning,) = exported.warnings
    assert "0.8 GB" in warning

    # It cannot.
    least = admission.MEMORY_AT_REST + 2 * weights
    monkeypatch.setattr(admission, "memory_limit", lambda: least - 1)
    steps: list[str] = []
    with pytest.raises(NoMemoryError, match=r"0\.8 GB"):
        export_small(wide(), tmp_path, plain=wide, on_step=steps.append)
    assert steps == []


@pytest.mark.slow
def test_inspect_tells_what_an_export_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(wide().state_dict(), tmp_path / "w.pth")
    (tmp_path / "rules.json").write_text(PREPROCESS.model_dump_json(), encoding="utf-8")
    arguments = [
        "inspect",
        str(tmp_path / "w.pth"),
        "--network",
        f"{__name__}:wide",
        "--preprocess",
        str(tmp_path / "rules.json"),
    ]
    small = CliRunner().invoke(app, arguments)

    assert small.exit_code == 0, small.output
    assert "memory" not in small.stdout

    # As for a network of 5 GB on a machine of 16 GB
    monkeypatch.setattr(
        "sopdeploy_export.user_network.admission.weight_bytes", lambda *_: 5_000_000_000
    )
    monkeypatch.setattr(admission, "memory_limit", lambda: 16_000_000_000)
    large = " ".join(CliRunner().invoke(app, arguments).stdout.split())

    assert large.count("20.8 GB") == 2  # in a row and in a warning
    assert "warning" in large

    # People inspect on one machine and export on another.
    monkeypatch.setattr(admission, "memory_limit", lambda: 8_000_000_000)
    inspected = CliRunner().invoke(app, arguments)
    assert inspected.exit_code == 0, inspected.output
    assert "warning" in inspected.stdout


def test_files_that_are_exchanged_after_they_were_read_do_not_run(path: Path) -> None:
    bundle = open_bundle(path)
    (path / GRAPH_DATA).write_bytes(bytes((path / GRAPH_DATA).stat().st_size))
    before = OnnxRuntime(bundle, Settings(threads=1)).run(IMAGES)["logits"]

    with torch.no_grad():
        images = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float()
        mean, std = (
            torch.tensor(values).view(3, 1, 1)
            for values in (bundle.manifest.preprocess.mean, bundle.manifest.preprocess.std)
        )
        expected = wide()((images / 255 - mean) / std).numpy()
    np.testing.assert_allclose(before, expected, rtol=1e-4, atol=1e-5)

    with pytest.raises(BundleError, match=rf"{GRAPH_DATA}: .*sha256"):
        open_bundle(path)


def change_a_weight(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another weight": (change_a_weight, GRAPH),
    "too short": (lambda content: content[:-64], f"{GRAPH_DATA} ends"),
    "too long": (
        lambda content: content + bytes(64),
        f"{GRAPH_DATA} has 64 bytes",
    ),
    "empty": (lambda _: b"", f"{GRAPH_DATA} ends"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_verify_compares_the_weights_with_the_graph_hash(case: str, path: Path) -> None:
    change, message = DAMAGED[case]
    bundle = open_bundle(path)
    changed = replace(bundle, weights=SealedFile([change((path / GRAPH_DATA).read_bytes())]))

    with pytest.raises(BundleError, match=message):
        check_graph_and_certificate(changed)


def test_a_graph_without_the_file_of_its_weights_is_refused(path: Path) -> None:
    alone = replace(open_bundle(path), weights=None)
    with pytest.raises(BundleError, match=GRAPH_DATA):
        check_graph_and_certificate(alone)
    with pytest.raises(RuntimeUnavailableError, match=GRAPH_DATA):
        OnnxRuntime(alone, Settings(threads=1))


def test_an_engine_is_not_built_of_weights_that_do_not_fit(path: Path) -> None:
    bundle = open_bundle(path)
    graph = onnx.load_model_from_string(bundle.onnx.read()).graph
    assert sum(map(len, weights_beside(bundle, graph).values())) > LIMIT

    next(each for each in graph.initializer if each.external_data).data_type = 99
    with pytest.raises(BundleError, match=rf"{GRAPH}: .*unknown type"):
        weights_beside(bundle, graph)


PLACES = {
    "beyond the end": {"offset": "64000000"},
    "before the beginning": {"offset": "-64"},
    "in another file": {"location": "../../../../etc/hostname"},
    "in the memory of the process": {"location": "*/_ORT_MEM_ADDR_/*"},
}


@pytest.mark.parametrize("case", PLACES)
def test_a_runtime_reads_no_weight_outside_of_the_file(case: str, path: Path) -> None:
    """A server does not compute the graph hash, so ONNX Runtime alone decides what it reads."""
    bundle = open_bundle(path)
    model = onnx.load_model_from_string(bundle.onnx.read())
    weight = next(each for each in model.graph.initializer if each.external_data)
    for entry in weight.external_data:
        entry.value = PLACES[case].get(entry.key, entry.value)
    changed = replace(bundle, graph=SealedFile([model.SerializeToString()]))

    with pytest.raises(RuntimeUnavailableError, match=r"load the graph"):
        OnnxRuntime(changed, Settings(threads=1))


def test_a_server_frees_the_weights_of_a_bundle(path: Path) -> None:
    assert open_bundle(path).reduced().weights is None


def test_a_bundle_that_was_read_without_its_graph_cannot_give_it(path: Path) -> None:
    bundle = open_bundle(path, with_graph=False)
    for name in (GRAPH, GRAPH_DATA):
        with pytest.raises(ValueError, match=f"{name}: .*hashed"):
            bundle.blocks(name)


def test_a_repository_of_triton_has_the_weights_beside_the_graph(
    path: Path, tmp_path: Path
) -> None:
    written = write_triton(Model.of_bundle(open_bundle(path)), tmp_path / "models")
    for name in (GRAPH, GRAPH_DATA):
        assert (written / "1" / name).read_bytes() == (path / name).read_bytes()


@pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
def test_openvino_refuses_them_and_names_another_runtime(path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"cannot read weights") as caught:
        OpenVINORuntime(open_bundle(path), Settings(threads=1))
    assert caught.value.remedies == {"runtime": "onnxruntime-cpu"}


def test_tensorrt_reads_them_from_memory(path: Path) -> None:
    trt = real_tensorrt()
    if trt is None:
        pytest.skip(ABSENT)
    bundle = open_bundle(path)

    assert bundle.weights is not None

    model = cast_images_first(onnx.load_model_from_string(bundle.onnx.read()))
    weights = read_external(model.graph, bundle.weights.view())
    profiles = (Profile(minimum=1, maximum=4),)
    plan = parse_and_build(
        trt, model.SerializeToString(), profiles, WORKSPACE, lambda _: None, weights
    )

    assert len(plan) > sum(map(len, weights.values()))


def test_an_engine_is_that_of_the_graph_and_its_weights(path: Path) -> None:
    bundle = open_bundle(path)
    gpu = Gpu(name="none", architecture="9.0", memory=1)
    key = key_fields(bundle, "11.0", gpu)
    files = dict(bundle.manifest.files)
    files[GRAPH_DATA] = files[GRAPH_DATA].model_copy(update={"sha256": "0" * 64})
    other = replace(bundle, manifest=bundle.manifest.model_copy(update={"files": files}))

    assert key_fields(other, "11.0", gpu)["bundle_onnx"] != key["bundle_onnx"]
