"""The generated pages are up to date, and the site is complete."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.reading import PAGES, ROOT, blocks, module_at, name, text_of


def outdated(made: dict[Path, str]) -> list[str]:
    return [name(page) for page, text in made.items() if page.read_text("utf-8") != text]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program behind `make docs`."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return module_at(ROOT / "docs" / "generate.py")


def test_the_generated_pages_are_up_to_date(generate: Any) -> None:
    assert outdated(generate.generated(with_models=False)) == [], "run `make docs`"


@pytest.mark.nightly
def test_the_counts_of_the_page_of_models_are_up_to_date(generate: Any) -> None:
    assert outdated(generate.generated()) == [], "run `make docs`"


BLOCK_OR_LINK = re.compile(r"^( *)```.*?^\1```|\[[^\]]*\]\([^)]*\)", re.DOTALL | re.MULTILINE)
CODE_OR_WORD = re.compile(r"`[^`]*`|[^\s`]+")
NAME = re.compile(r"`?([\w./-]+\.md)`?[.,;:)]*")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_that_names_another_one_links_to_it(page: Path) -> None:
    words = CODE_OR_WORD.findall(BLOCK_OR_LINK.sub("", page.read_text(encoding="utf-8")))
    named = [found[1] for word in words if (found := NAME.fullmatch(word))]
    places = {(folder / path).resolve() for path in named for folder in (ROOT, page.parent)}
    # Its pages cannot link to others
    of_the_site = {one for one in PAGES if one.parent != ROOT}
    linked = of_the_site if page in of_the_site else {*PAGES}

    assert [name(one) for one in places & linked if one != page] == []


# Phrases that no native speaker writes, and words that would mean two things here: a root is a
# matrix square root, an answer neither a prediction nor a response, an engine TensorRT's, and drift
# no numerical error. A network takes images, and people have photos (`docs/glossary.md`).
AVOIDED = (
    r"\b(an own|of yours|anew|by lot|the about|start weights|(?<!-)held-out (?:image|photo)\w*|"
    r"(?:Merkle|graph|equal) roots?|(?:an|the|no|its|wrong) answers?|few-shot (?:head|classifier)|"
    r"engine (?:process|dies|starts)\w*|drift (?:in|of) (?:noise|the logits)|"
    r"(?<!#)photographs?(?!\.ipynb))\b"
)


@pytest.mark.parametrize("page", sorted({*PAGES} - {ROOT / "CHANGELOG.md"}), ids=name)
def test_pages_avoid_phrases_that_must_be_read_twice(page: Path) -> None:
    assert re.findall(AVOIDED, page.read_text(encoding="utf-8")) == []


# Words of ours, and the pages that explain them beside the glossary
OURS = {
    r"[Bb]undles?": ("bundle.md",),
    r"[Rr]ecipes?": ("recipes.md",),
    r"[Aa]uxiliary (?:branch|head)(?:es|s)?": ("second-order.md", "proof.md", "own-network.md"),
    r"noise floors?": (),
    r"graph hash(?:es)?": ("proof.md",),
    r"(?:TensorRT )?engines?": ("tensorrt.md", "gpu.md", "bundle.md"),
}
LISTS = ("cli", "errors", "metrics", "models", "compatibility")
GUIDES = [
    page
    for page in PAGES
    if page.is_relative_to(ROOT / "docs")
    and page.parent.name != "benchmarks"
    and page.stem not in {"index", "quickstart", "glossary", *LISTS}
]


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_a_page_links_each_word_of_ours_that_it_uses(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    # Sentences: no blocks, links, code, headings and cells.
    prose = re.sub(
        r"`[^`]*`|^(?:#|\||    ).*$", "", BLOCK_OR_LINK.sub("", text), flags=re.MULTILINE
    )
    linked = {Path(link).name for link in re.findall(r"\]\(([^)#]+\.md)", text)}

    used = [word for word in OURS if re.search(rf"\b{word}\b", prose)]
    assert [
        word for word in used if not (linked | {page.name}) & {"glossary.md", *OURS[word]}
    ] == []


# What a reader searches for, by the page that describes it
FIELD = {
    "second-order.md": (
        "second-order pooling, covariance pooling, detachable second-order pooling, matrix square root, "
        "global second-order pooling, gated mixture of second-order pooling, iSQRT-COV, Newton-Schulz"
    ),
    "own-network.md": "auxiliary branch, auxiliary head, training-only",
    "train.md": "pretrained weights, fine-tune, transfer learning, early stopping, "
    "multi-GPU, DDP, TensorBoard, learning curves",
    "photos.md": "validation set, linear classifier on frozen features, LDA, fine-tuning, cross-validated",
    "recipes.md": "mixed precision, autocast, data augmentation, learning-rate schedule, distillation",
    "evaluate.md": "out-of-distribution (OOD) detection, open-set rejection, calibration",
    "monitoring.md": "p99, distribution shift, data drift",
    "bundle.md": "dynamic batch axis, ONNX opset, numerical error, tolerance, reference inputs, test vectors",
    "gpu.md": "throughput, latency, dynamic batching, post-training static INT8 quantization, half precision",
    "operations.md": "worker processes",
    "glossary.md": "linear probe, LDA, Merkle hash, backend",
}


@pytest.mark.parametrize("page", FIELD)
def test_a_page_has_the_words_of_the_field_for_what_it_describes(page: str) -> None:
    text = " ".join(text_of(f"docs/{page}").split()).lower()
    assert [word for word in FIELD[page].split(", ") if word.lower() not in text] == []


def test_every_row_of_the_security_page_names_tests_that_exist() -> None:
    lines = (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.endswith("| tests |")]
    tests = {row: re.findall(r"`(tests/[\w/.]+)`", row.rpartition(" | ")[2]) for row in rows}
    assert [row for row, files in tests.items() if not files] == []

    missing = [file for files in tests.values() for file in files if not (ROOT / file).exists()]
    assert missing == []
    assert len(rows) > 40


@pytest.mark.parametrize(
    ("language", "parse"),
    [("json", json.loads), ("toml", tomllib.loads), ("yaml", yaml.safe_load)],
)
def test_examples_of_files_and_answers_can_be_parsed(
    language: str, parse: Callable[[str], Any]
) -> None:
    examples = [parse(block) for page in PAGES for block in blocks(page, language)]

    assert len(examples) >= 3
    assert all(isinstance(example, dict) for example in examples)


README = ROOT / "README.md"


ABOUT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "description"
]
# Where the project describes itself
DESCRIBED = (
    "README.md",
    "docs/index.md",
    "commands/sopdeploy_commands/app.py",  # `sopdeploy --help`
    "sopdeploy/__init__.py",
    "mkdocs.yml",
    "deploy/helm/sopdeploy/Chart.yaml",
    "Dockerfile",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CITATION.cff",
)


@pytest.mark.parametrize("file", DESCRIBED)
def test_the_project_describes_itself_by_one_sentence_everywhere(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    without_marks = " ".join(re.sub(r"[\"']\s*[\"']", "", text).split())

    assert ABOUT.removeprefix("Train") in without_marks


def test_the_readme_tries_and_installs_it_then_trains() -> None:
    text = README.read_text(encoding="utf-8")
    assert text[: text.index("sopdeploy serve")].count("\n") < 45

    first, installs, branches, own = blocks(README, "sh")[:4]
    assert first.splitlines() == ["make demo", "make test"]
    assert [line.split()[:2] for line in installs.splitlines()] == [["pip", "install"]] * 2
    activates, *commands = branches.splitlines()
    assert activates == ". .venv/bin/activate"
    for lines in (commands, own.splitlines()):
        assert [line.split()[:2] for line in lines] == [["sopdeploy", name] for name in FIRST]


FIRST = ("train", "export", "serve")


# What three kinds of users want, the page that says how, and what stands there.
WANTED = {
    # Sixty photographs, and no knowledge of machine learning.
    "see it without photographs": ("README.md", "make demo"),
    "train on one folder per class": ("README.md", "sopdeploy train --data photos"),
    "label photographs": ("docs/keep.md", "sopdeploy label project-1.csv"),
    "know how good it is": ("docs/evaluate.md", "95 % interval"),
    "use photographs of a phone": ("docs/photos.md", ".[train,cpu,heif]"),
    "open the page on another machine": ("docs/operations.md", "--host 0.0.0.0"),
    # A PyTorch network with two auxiliary heads.
    "export without the heads": ("docs/own-network.md", "--training-only 'aux*'"),
    "know what is proved": ("docs/proof.md", "refused"),
    "give my preprocessing": ("docs/own-network.md", "--preprocess FILE"),
    "run the file in C++": ("deploy/samples/README.md", "cpp/classify.cpp"),
    "compute known in my program": ("docs/bundle.md", "log-sum-exp"),
    "make it smaller": ("docs/gpu.md", "--precision int8"),
    # Kubernetes behind nginx.
    "install the chart": ("docs/deploy.md", "helm install shop"),
    "serve a path behind nginx": ("docs/proxies.md", "location /ml"),
    "give keys to pods": ("docs/deploy.md", "`keys.secret`"),
    "limit memory": ("docs/settings.md", "resources.limits.memory"),
    "alert": ("docs/monitoring.md", "SopdeployRestarts"),
    "undo a release": ("docs/operations.md", "helm rollback shop"),
    "serve two versions": ("docs/http.md", "serve old=A new=B"),
}
CLICK = re.compile(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)")


def clicks(page: Path) -> set[Path]:
    """Pages to which links of *page* lead."""
    links = CLICK.findall(page.read_text(encoding="utf-8"))
    return {(page.parent / link).resolve() for link in links}


@pytest.mark.parametrize("task", WANTED)
def test_each_task_of_a_user_is_two_clicks_from_the_readme(task: str) -> None:
    page, words = WANTED[task]
    first = clicks(README)
    near = {README, *first}.union(*map(clicks, first))

    assert ROOT / page in near
    assert words in text_of(page)


def test_each_alert_has_a_row_with_its_severity_and_a_test() -> None:
    chart = yaml.safe_load(text_of("deploy/helm/sopdeploy/alerts.yaml"))
    rules = [rule for group in chart["groups"] for rule in group["rules"] if "alert" in rule]
    page = text_of("docs/monitoring.md")
    tests = "".join(file.read_text("utf-8") for file in (ROOT / "tests/deploy").glob("*.yaml"))

    rows = re.findall(r"^\| `(\w+)` (\w+) \|", page, re.MULTILINE)
    assert rows == [(rule["alert"], rule["labels"]["severity"]) for rule in rules]
    assert {*re.findall(r'alertname="(\w+)"', tests)} == {rule["alert"] for rule in rules}


LOADED = re.compile(
    r"""<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
)
LINKED = re.compile(r"""(?:src|href)="(?!\w+:|//|#)([^"?#]+)""")


@pytest.mark.nightly
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed"
)
def test_the_site_builds_without_warnings_and_is_self_contained(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",  # with `--quiet`, mkdocs counts no warnings
            "--site-dir",
            str(tmp_path),
        ],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 25

    index = json.loads((tmp_path / "search" / "search_index.json").read_text(encoding="utf-8"))
    last = {
        entry["location"].partition("#")[0]
        for entry in index["docs"]
        if entry.get("boost", 1) < 0.1
    }
    notes = {
        f"benchmarks/{page.stem}.html" for page in (ROOT / "docs" / "benchmarks").glob("*.md")
    }
    assert last == notes

    texts = {
        page: page.read_text(encoding="utf-8") for page in pages if page.name != "404.html"
    }
    assert [url for text in texts.values() for url in LOADED.findall(text)] == []

    files = [
        (page.parent / file).resolve()
        for page, text in texts.items()
        for file in LINKED.findall(text)
    ]
    assert [
        file for file in files if not (file.exists() and file.is_relative_to(tmp_path))
    ] == []
