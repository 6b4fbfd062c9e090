"""Files of a bundle that somebody exchanges between check and use, and how often each of them is read."""

import asyncio
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from PIL import Image

from sopdeploy.bundle import folder, signing
from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.bundle.golden import read_golden
from sopdeploy.bundle.onnx_root import check_graph_and_certificate
from sopdeploy.bundle.probes import read_probes
from sopdeploy.bundle.sealed import (
    HashedBlocks,
    SealedFile,
    create_memory,
    map_memory,
    read_memory,
)
from sopdeploy.errors import BundleError, RuntimeUnavailableError, SopdeployError
from sopdeploy_commands.predict import predict
from sopdeploy_commands.promote import promote
from sopdeploy_commands.verify import verify
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.inference.model_registry import ModelRegistry
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.runtime.openvino import OpenVINORuntime
from sopdeploy_service.server.process import load_registry
from sopdeploy_service.settings import Settings
from tests.support.keys import sign, write_key
from tests.support.pictures import encoded
from tests.support.service import write_bundle

IMAGES = np.random.default_rng(7).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
LATER = "2030-01-01T00:00:00.000000Z"
Found = dict[str, Any]  # the digest, answers or contents that a use of a bundle gives


@dataclass(frozen=True)
class World:
    """A signed *bundle*, and one of another network that nobody signed."""

    root: Path
    name: str
    other_name: str

    @property
    def bundle(self) -> Path:
        return self.root / "bundles" / self.name

    @property
    def other(self) -> Path:
        return self.root / "others" / self.other_name

    @property
    def settings(self) -> Settings:
        return Settings(threads=1, require_signature=self.root / "release.key.pub")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    bundle = write_bundle(root / "bundles", seed=0)
    other = write_bundle(root / "others", seed=1, exported_at=LATER)
    write_bundle(root / "served", seed=2).rename(root / "first")
    write_key(root / "release.key")
    sign(bundle, root / "release.key")

    for number, label in enumerate(("ant", "bee")):
        (root / "photos" / label).mkdir(parents=True)
        (root / "photos" / label / "1.png").write_bytes(
            encoded(Image.fromarray(IMAGES[number]), "PNG")
        )

    return World(root, bundle.name, other.name)


@pytest.fixture
def world(original: World, tmp_path: Path) -> World:
    root = Path(shutil.copytree(original.root, tmp_path / "world", symlinks=True))
    return World(root, original.name, original.other_name)


def answers(bundle: Bundle, run: Callable[[NDArray[np.uint8]], Any]) -> Found:
    return {
        "id": bundle.manifest.id,
        "labels": bundle.labels,
        "logits": run(IMAGES)["logits"].tolist(),
    }


def started(world: World, source: Path, **settings: Any) -> Found:
    model = load_registry([source], world.settings.model_copy(update=settings)).find()
    return answers(model.bundle, model._runtime.run)


def reloaded(world: World, source: Path) -> Found:
    async def run() -> Found:
        first = load_model(world.root / "first", Settings(threads=1))
        registry = ModelRegistry({"tiny": first}, world.settings)
        await registry.start()
        before = registry.find()
        await registry.reload([source])
        model = registry.find()
        found = answers(model.bundle, model._runtime.run)
        await registry.stop()
        if model is before:
            raise BundleError("not reloaded")
        return found

    return asyncio.run(run())


def predicted(world: World) -> Found:
    found = predict(world.bundle, [Image.fromarray(IMAGES[0])], threads=1, top_k=7)[0]
    return {one.label: one.probability for one in found.classes}


def verified(world: World) -> Found:
    result = verify(world.bundle, world.settings)
    return {"id": result.id, "bytes": result.bytes, "onnx_root": result.onnx_root}


def promoted(world: World) -> Found:
    link = world.bundle.with_name("live")
    promote(world.bundle, link)
    return started(world, link)


USES: dict[str, Callable[[World], Found]] = {
    "start": lambda world: started(world, world.bundle),
    "start with a link": lambda world: started(world, world.bundle.with_name("latest")),
    "reload": lambda world: reloaded(world, world.bundle),
    "predict": predicted,
    "verify": verified,
    "promote": promoted,
}
NAMES = [
    "manifest.json",
    "model.onnx",
    "labels.json",
    "probes.npz",
    "golden-0.jpg",
    "certificate.json",
]


def exchange_all(world: World, target: Path, _name: str) -> None:
    """Rename every file of the other bundle into *target*."""
    for file in world.other.iterdir():
        shutil.copyfile(file, target.with_name(".exchanged"))
        target.with_name(".exchanged").replace(target / file.name)


def exchange_graph(world: World, target: Path, _name: str) -> None:
    """Rename the graph and the probes of the other bundle into *target*, as in a race of a file watcher."""
    for name in ("model.onnx", "probes.npz"):
        shutil.copyfile(world.other / name, target.with_name(".exchanged"))
        target.with_name(".exchanged").replace(target / name)


def write_in_place(world: World, target: Path, name: str) -> None:
    """Write into the file that was read, so that the same open file has other content."""
    (target / name).chmod(0o644)
    (target / name).write_bytes((world.other / name).read_bytes())


def move_links(world: World, target: Path, _name: str) -> None:
    """Lead the links beside *target* to the other bundle, and put this one in the place of *target*."""
    (target.with_name("latest")).unlink(missing_ok=True)
    (target.with_name("latest")).symlink_to(world.other)
    target.rename(target.with_name("moved away"))
    target.symlink_to(world.other)


CHANGES = {
    "all files": exchange_all,
    "graph": exchange_graph,
    "in place": write_in_place,
    "links": move_links,
}


@contextmanager
def after_reading(name: str, do: Callable[[Path], None]) -> Iterator[list[Path]]:
    """Call *do* with the folder, a moment after its file *name* was read first; yield these folders."""
    calls: list[Path] = []
    hashed, read_at_most = HashedBlocks.sha256.fget, folder.read_at_most  # type: ignore[attr-defined]

    def call(path: Path) -> None:
        if path.name == name and not calls:
            calls.append(path.parent)
            do(path.parent)

    def sha256(blocks: Any) -> str:
        path = Path(f"/proc/self/fd/{blocks._file.fileno()}").readlink()
        digest: str = hashed(blocks)
        call(path)
        return digest

    def read(file: IO[bytes], limit: int) -> bytes:
        content = read_at_most(file, limit)
        call(Path(file.name))
        return content

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HashedBlocks, "sha256", property(sha256))
        patch.setattr(folder, "read_at_most", read)
        patch.setattr(signing, "read_at_most", read)
        yield calls


@pytest.fixture(scope="module")
def expected(
    original: World, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Found]:
    """What each use gives if nobody exchanges anything."""

    @cache
    def find(use: str) -> Found:
        root = Path(
            shutil.copytree(original.root, tmp_path_factory.mktemp("calm") / "x", symlinks=True)
        )
        return USES[use](World(root, original.name, original.other_name))

    return find


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use", USES)
def test_what_is_exchanged_after_it_was_read_is_not_used(
    use: str, name: str, change: str, world: World, expected: Callable[[str], Found]
) -> None:
    usual = expected(use)
    with after_reading(name, lambda target: CHANGES[change](world, target, name)) as calls:
        try:
            found = USES[use](world)
        except SopdeployError:
            found = None  # refused

    assert len(calls) == 1
    assert found in (None, usual)
    if use in {"start", "predict"} and change == "in place" and name != "manifest.json":
        assert found == usual, "what was read is enough"


@pytest.mark.parametrize("use", ["start", "reload", "verify"])
def test_a_signature_exchanged_after_it_was_read_has_no_effect(
    use: str, world: World, expected: Callable[[str], Found]
) -> None:
    usual, name = expected(use), f"{world.name}.sig"
    with after_reading(name, lambda target: (target / name).unlink()) as calls:
        assert USES[use](world) == usual
    assert calls == [world.bundle.parent]


OPENED: list[tuple[str, int]] = []
_watching = False


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event == "open" and isinstance(arguments[0], str | os.PathLike):
        OPENED.append((os.fspath(arguments[0]), arguments[2]))


sys.addaudithook(_note)  # cannot be removed; it notes nothing outside of `opened`


@contextmanager
def opened(bundle: Path) -> Iterator[Counter[str]]:
    """Count how often each file of *bundle*, or of other bundles, is opened during the block."""
    global _watching
    counts: Counter[str] = Counter()
    OPENED.clear()
    _watching = True

    try:
        yield counts
    finally:
        _watching = False
        names = {file.name for file in bundle.iterdir()}
        read = [Path(path) for path, flags in OPENED if flags & os.O_ACCMODE == os.O_RDONLY]
        counts.update(
            path.name for path in read if path.name in names and path.parent.name != "1"
        )


# How often each file is opened, and the manifest
TIMES = {
    **dict.fromkeys(USES, (1, 1)),
    "reload": (2, 2),  # with the bundle that was served before
}


@pytest.mark.parametrize(
    ("use", "times", "manifests"),
    [(use, *TIMES[use]) for use in USES if use != "promote"],
)
def test_each_file_of_a_bundle_is_opened_once(
    use: str, times: int, manifests: int, world: World
) -> None:
    files = open_bundle(world.bundle).manifest.files
    with opened(world.bundle) as counts:
        USES[use](world)

    assert counts == dict.fromkeys((*files, "manifest.json"), times) | {
        "manifest.json": manifests
    }


def test_all_that_is_made_from_a_bundle_needs_no_folder_any_more(world: World) -> None:
    usual = open_bundle(world.bundle)
    logits = OnnxRuntime(usual, Settings(threads=1)).run(IMAGES)["logits"]
    shutil.rmtree(world.root)

    assert np.array_equal(OnnxRuntime(usual, Settings(threads=1)).run(IMAGES)["logits"], logits)
    assert check_graph_and_certificate(usual) == usual.manifest.lineage.onnx_root
    assert len(read_golden(usual)) == 3
    assert len(read_probes(usual).images) == 3

    content = b"".join(usual.blocks("model.onnx"))
    assert content == usual.onnx.read()


def with_external_weights(bundle: Bundle, location: str) -> Bundle:
    """Return *bundle* with a graph whose weights are in another file, at *location*."""
    model = onnx.load_model_from_string(bundle.onnx.read())
    tensor = model.graph.initializer[0]
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
        tensor.external_data.add(key=key, value=value)
    return folder.replace(bundle, graph=SealedFile([model.SerializeToString()]))


@pytest.mark.parametrize(
    "location", ["weights.bin", "model.onnx", "../weights.bin", "fd/0", "{cwd}/weights.bin"]
)
@pytest.mark.parametrize("runtime", [OnnxRuntime, OpenVINORuntime])
def test_weights_outside_of_the_graph_are_not_read(
    runtime: type[OnnxRuntime | OpenVINORuntime],
    location: str,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(world.bundle)
    Path("weights.bin").write_bytes(bytes(3 * 7 * 4))
    Path("../weights.bin").write_bytes(bytes(3 * 7 * 4))
    bundle = with_external_weights(open_bundle(world.bundle), location.format(cwd=world.bundle))

    with pytest.raises(RuntimeUnavailableError, match=r"model\.onnx"):
        runtime(bundle, Settings(threads=1))


def test_nobody_can_write_to_a_sealed_file() -> None:
    file = SealedFile([b"checked", b" bytes"])
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        try:
            descriptor = os.open(file.path, flags)
        except PermissionError:
            continue
        with pytest.raises(PermissionError):
            os.write(descriptor, b"x")
        os.close(descriptor)

    assert file.read() == b"checked bytes"


def test_where_files_cannot_be_sealed_a_private_copy_takes_their_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    file = SealedFile([b"checked", b" bytes"])
    private = Path(file.path).parent

    assert (file.read(), private.stat().st_mode & 0o777) == (b"checked bytes", 0o700)

    del file
    assert not private.exists()


READS: dict[str, tuple[Callable[[int], Any], bytes]] = {
    "mapped": (map_memory, b"abc"),
    "mapped, but empty": (map_memory, b""),
    "read": (read_memory, b"abc"),
    "read, but too large": (partial(read_memory, max_bytes=2), b"abc"),
}


@pytest.mark.parametrize("case", READS)
def test_a_file_in_memory_is_closed_by_who_reads_it(case: str) -> None:
    read, content = READS[case]
    file = create_memory("content", [content])
    fails = pytest.raises((OSError, ValueError)) if "but" in case else nullcontext()
    with fails:
        assert bytes(read(file)[:]) == content

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
