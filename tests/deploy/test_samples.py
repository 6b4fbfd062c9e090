"""Golden examples, and the programs in other languages that reproduce them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import onnxruntime
import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.golden import GOLDEN, Golden, check_golden, draw_jpegs, read_golden
from sopdeploy.errors import BundleError, ParityError
from sopdeploy.images import fast_resize
from sopdeploy.images.decode import decode
from sopdeploy.images.preprocess import Fit, Preprocess
from sopdeploy_commands.verify import verify
from sopdeploy_service.settings import Settings
from tests.docs.reading import blocks_of, text_of
from tests.support.children import line_of
from tests.support.forged import forge
from tests.support.rooms import ROOT
from tests.support.service import LABELS, picture_bytes, write_bundle

SAMPLES = ROOT / "deploy" / "samples"
NODE_MODULES = SAMPLES / "javascript" / "node_modules"
HEADERS = ("cstdio", "jpeglib.h", "nlohmann/json.hpp", "onnxruntime_cxx_api.h")
INCLUDE = "-I/usr/include/onnxruntime"
RULES = {
    "crop": Preprocess(resize=36, crop=32),
    "crop-bicubic": Preprocess(resize=61, crop=32, interpolation="bicubic"),
    "pad": Preprocess(resize=36, crop=32, fit="pad", background=(10, 20, 30)),
    "squash": Preprocess(resize=70, crop=32, fit="squash", interpolation="bicubic"),
    "squash-crop": Preprocess(resize=41, crop=32, fit="squash-crop"),
    "squash, rows first": Preprocess(resize=40, crop=32, fit="squash", interpolation="bicubic"),
}


@pytest.fixture(params=RULES)
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_bundle(tmp_path, preprocess=RULES[request.param])


def test_verify_reproduces_golden_examples(bundle: Path) -> None:
    assert verify(bundle, Settings(threads=1)).golden == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(tolerance=None), "golden.json: "),
        (lambda index: index["examples"][0].update(jpeg="../x"), "does not fit"),
        (lambda index: index["examples"][0].update(pixels="golden-0.jpg"), "does not fit"),
        (lambda index: index["examples"][0]["logits"].pop(), "does not fit"),
        (
            lambda index: index["examples"][0]["logits"].insert(
                0, index["examples"][0]["logits"].pop()
            ),
            "bound",
        ),
        (lambda index: index["examples"][0].update(jpeg="golden-1.jpg"), "gray levels"),
    ],
)
def test_golden_examples_of_another_network_fail(
    change: Callable[[dict], None], message: str, tmp_path: Path
) -> None:
    path = write_bundle(tmp_path)
    index = json.loads((path / GOLDEN).read_bytes())
    change(index)
    (path / GOLDEN).write_text(json.dumps(index))

    with pytest.raises((BundleError, ParityError), match=message):
        verify(forge(path), Settings(threads=1))


def test_pixels_of_a_decoder_that_differs_fail(tmp_path: Path) -> None:
    example = read_golden(open_bundle(write_bundle(tmp_path)))[0]
    pixels = example.pixels.astype(np.int16)
    for change in (1, 2):
        moved = pixels + np.where(pixels < 128, change, -change)
        with (
            nullcontext()
            if change == 1
            else pytest.raises(ParityError, match=r"2 gray levels.* 12\.3\.0")
        ):
            check_golden(
                example,
                moved.astype(np.uint8),
                lambda _: example.logits,
                "12.3.0",
                Preprocess(),
            )


def single(levels: int) -> Callable[[np.ndarray], np.ndarray]:
    """Move one value by *levels*."""

    def move(pixels: np.ndarray) -> np.ndarray:
        moved = pixels.astype(np.int16)
        first = moved.flat[0]
        moved.flat[0] = first + levels if first < 128 else first - levels
        return moved

    return move


def all_by_one(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.int16) + np.where(pixels < 128, 1, -1)


MOVED = {
    "at the limit of bilinear": ("fast", "bilinear", single(3), True),
    "above the limit of bilinear": ("fast", "bilinear", single(4), False),
    "at the limit of bicubic": ("fast", "bicubic", single(32), True),
    "above the limit of bicubic": ("fast", "bicubic", single(33), False),
    "all values by one": ("fast", "bicubic", all_by_one, False),
    "all values by one, resized by Pillow": ("scaled", "bicubic", all_by_one, True),
    "one value by two, resized by Pillow": ("scaled", "bicubic", single(2), False),
}


@pytest.mark.parametrize("case", MOVED)
def test_pixels_that_were_resized_fast_may_differ_as_pillows_do(
    case: str, tmp_path: Path
) -> None:
    decoding, interpolation, move, is_accepted = MOVED[case]
    rules = Preprocess(resize=36, crop=32, interpolation=interpolation, decoding=decoding)
    example = read_golden(open_bundle(write_bundle(tmp_path, preprocess=rules)))[0]
    with nullcontext() if is_accepted else pytest.raises(ParityError, match="gray levels"):
        moved = move(example.pixels).astype(np.uint8)
        levels, is_changed = check_golden(example, moved, lambda _: example.logits, None, rules)
        assert not is_changed
        assert levels == np.abs(moved.astype(np.int16) - example.pixels).max()


@pytest.mark.parametrize(
    ("decoding", "has_resizer", "differs"),
    [("fast", True, False), ("fast", False, True), ("scaled", False, False)],
)
def test_verify_tells_pixels_of_another_resizer(
    decoding: str, has_resizer: bool, differs: bool, tmp_path: Path, monkeypatch
) -> None:
    rules = Preprocess(resize=36, crop=32, interpolation="bicubic", decoding=decoding)
    bundle = write_bundle(tmp_path, preprocess=rules)
    if not has_resizer:
        monkeypatch.setattr(fast_resize, "cykooz_resizer", None)

    verified = verify(bundle, Settings(threads=1))
    assert verified.golden > 0
    assert (verified.golden_levels > 0) == differs
    assert verified.golden_levels <= fast_resize.MAX_LEVELS["bicubic"]


def fits(jpeg: bytes, fast: Preprocess, decoding: str) -> bool:
    """Whether the pixels of *jpeg* by another *decoding* pass for those of *fast*."""
    example = Golden("0", jpeg, decode(jpeg, fast).pixels, np.zeros(2, np.float32), 0.0)
    pixels = decode(jpeg, fast.model_copy(update={"decoding": decoding})).pixels
    try:
        check_golden(example, pixels, lambda _: example.logits, None, fast)
    except ParityError:
        return False
    return True


@pytest.mark.parametrize("fit", get_args(Fit))
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_examples_that_were_resized_fast_fit_pillow_but_no_other_scale_of_decoding(
    interpolation: str, fit: str
) -> None:
    for resize, crop in ((256, 224), (64, 64), (36, 32)):
        rules = Preprocess(
            resize=resize, crop=crop, interpolation=interpolation, fit=fit, decoding="fast"
        )
        jpegs = draw_jpegs(rules)
        assert [fits(jpeg, rules, "scaled") for jpeg in jpegs] == [True, True, True, True]
        # Only the last one is large enough to be decoded at a smaller scale.
        assert [fits(jpeg, rules, "full") for jpeg in jpegs] == [True, True, True, False]


def run_sample(command: list[str | Path], bundle: Path, photo: Path) -> None:
    """Reproduce the golden examples of *bundle*, classify *photo*, and reject what is not a JPEG."""
    done = subprocess.run(
        [*command, bundle, "--golden"], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same class") == 3
    photo.write_bytes(picture_bytes())
    named = subprocess.run(
        [*command, bundle, photo], capture_output=True, text=True, check=True
    )

    labels = open_bundle(bundle).labels
    assert any(named.stdout.rstrip().endswith(f": {label}") for label in labels)
    photo.write_bytes(b"no image")
    bad = subprocess.run([*command, bundle, photo], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert "error: " in bad.stderr


def test_the_javascript_sample_reproduces_the_golden_examples(
    program: Callable[[str], str], bundle: Path, tmp_path: Path
) -> None:
    node = program("node")
    if not NODE_MODULES.is_dir():
        pytest.skip("run `npm ci` in deploy/samples/javascript")
    run_sample([node, SAMPLES / "javascript" / "classify.mjs"], bundle, tmp_path / "photo.jpg")


def no_headers() -> bool:
    """Whether the compiler or the headers of the C++ sample are missing."""
    if shutil.which("g++") is None:
        return True
    command = ["g++", INCLUDE, "-E", "-x", "c++", "-o", os.devnull, "-"]
    included = "".join(f"#include <{name}>\n" for name in HEADERS)
    return (
        subprocess.run(
            command, input=included, text=True, capture_output=True, check=False
        ).returncode
        != 0
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the sample with the library of the Python package."""
    if no_headers():
        pytest.skip(
            "g++ or the headers of ONNX Runtime, libjpeg and nlohmann/json are not installed"
        )
    [library] = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.1*")
    folder = tmp_path_factory.mktemp("sample")
    (folder / "libonnxruntime.so.1").symlink_to(library)
    source = SAMPLES / "cpp" / "classify.cpp"
    program = folder / "classify"
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-isystem", INCLUDE[2:]]
    libraries = ["-ljpeg", library, f"-Wl,-rpath,{folder}"]
    subprocess.run(["g++", *options, source, "-o", program, *libraries], check=True)
    return program


@pytest.mark.nightly
def test_the_cpp_sample_reproduces_the_golden_examples(
    compiled: Path, bundle: Path, tmp_path: Path
) -> None:
    run_sample([compiled], bundle, tmp_path / "photo.jpg")


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with `photo.jpg`, and the address of a server."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "photo.jpg").write_bytes(picture_bytes())
    command = [
        sys.executable,
        "-m",
        "sopdeploy",
        "serve",
        str(write_bundle(folder)),
        "--port",
        "0",
    ]

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as server:
        try:
            yield folder, line_of(server).split()[1].rstrip("/")
        finally:
            server.terminate()


@dataclass(frozen=True)
class Language:
    """How a program of a page is stored and run."""

    file: str
    run: tuple[str, ...]
    needs: str
    marks: tuple[pytest.MarkDecorator, ...] = ()


COMPILED = (pytest.mark.nightly,)
LANGUAGES = {
    "sh": Language("program.sh", ("sh",), needs="curl"),
    "python": Language("program.py", (sys.executable,), needs=sys.executable),
    "js": Language("program.mjs", ("node",), needs="node"),
    "java": Language("Classify.java", ("java",), needs="javac", marks=COMPILED),
    "go": Language("classify.go", ("go", "run"), needs="go", marks=COMPILED),
}


def missing_tools() -> list[str]:
    """List the programs that the shown ones need and that are not installed."""
    return [how.needs for how in LANGUAGES.values() if shutil.which(how.needs) is None]


PROGRAMS = {"README.md": ("sh", "python"), "docs/http.md": ("js", "java", "go")}
SHOWN = [
    (page, language, block)
    for page, languages in PROGRAMS.items()
    for language in languages
    for block in blocks_of(text_of(page), language)
    if "v1/classify" in block or "client.classify" in block
]


@pytest.mark.parametrize(
    ("page", "language", "source"),
    [
        pytest.param(*shown, id=f"{shown[0]}-{shown[1]}", marks=LANGUAGES[shown[1]].marks)
        for shown in SHOWN
    ],
)
def test_a_shown_program_classifies(
    page: str,
    language: str,
    source: str,
    serving: tuple[Path, str],
    program: Callable[[str], str],
) -> None:
    how = LANGUAGES[language]
    program(how.needs)
    folder, url = serving
    file = folder / how.file
    file.write_text(source.replace("http://127.0.0.1:8000", url), encoding="utf-8")
    environment = {
        **os.environ,
        "NO_PROXY": "127.0.0.1",
        "GOCACHE": str(folder / "go"),
        "GOTOOLCHAIN": "local",
    }
    done = subprocess.run(
        [*how.run, file],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert any(label in done.stdout for label in LABELS)


def test_the_readme_classifies_from_curl_and_python_and_pages_from_every_language() -> None:
    of_readme = [language for page, language, _ in SHOWN if page == "README.md"]

    assert of_readme == ["sh", "python"]
    assert {language for _, language, _ in SHOWN} == {*LANGUAGES}
