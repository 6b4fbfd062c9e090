"""The shape of the project, checked: what a reader may rely on without reading everything."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sopdeploy
from sopdeploy import errors
from tests.docs.reading import module_at

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "sopdeploy": ROOT / "sopdeploy",
    "sopdeploy_export": ROOT / "export" / "sopdeploy_export",
    "sopdeploy_service": ROOT / "service" / "sopdeploy_service",
}
MODULES = sorted(path for package in PACKAGES.values() for path in package.rglob("*.py"))
LONGEST = 400
TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".sh", ".html", ".css", ".js", ".json", ".cfg", ""}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked_texts() -> list[Path]:
    """Return the text files that git knows or would know; all of them where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        skip = {".venv", "dist", "build", "runs", "bundles", "demo", ".git"}
        paths = [path for path in ROOT.rglob("*") if not skip & set(path.relative_to(ROOT).parts)]
    else:
        paths = [ROOT / line for line in found.stdout.splitlines()]
    return sorted(path for path in paths if path.is_file() and path.suffix in TEXT)


TEXTS = tracked_texts()
PAGES = [path for path in TEXTS if path.suffix == ".md"]


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_a_module_fits_on_a_few_screens(module: Path) -> None:
    lines = module.read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_that_it_is_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


def undocumented(module: Path) -> list[str]:
    """Return the public functions and classes of *module*, methods too, that say nothing of themselves."""
    found: list[str] = []

    def look(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_") or is_overload(node):
                continue
            if not ast.get_docstring(node):
                found.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                look(node.body, f"{prefix}{node.name}.")

    look(ast.parse(module.read_text(encoding="utf-8")).body, "")
    return found


def is_overload(node: Any) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "overload" for d in getattr(node, "decorator_list", []))


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_every_public_function_and_class_says_what_it_does(module: Path) -> None:
    assert undocumented(module) == []


@pytest.mark.parametrize("module", [m for m in MODULES if m.name != "__init__.py"], ids=name)
def test_every_module_begins_with_its_idea(module: Path) -> None:
    assert ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))


# /mnt/models is where KServe puts a model, on every machine.
LOCAL_PATH = re.compile(r"(?<![\w.$}~*])/(?:home|tmp|root|Users|mnt(?!/models\b))/\w")


def test_no_file_speaks_of_one_machine() -> None:
    found = [
        f"{name(path)}:{number}"
        for path in TEXTS
        if "tests" not in path.relative_to(ROOT).parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if LOCAL_PATH.search(line)
    ]
    assert found == []


def test_nothing_is_left_to_do_in_comments() -> None:
    marks = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    found = [name(path) for path in TEXTS if marks.search(path.read_text(encoding="utf-8"))]
    assert found == []


ERRORS = sorted(
    kind.__name__
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.SopdeployError)
)


def code_of(folder: Path) -> str:
    paths = sorted(path for path in folder.rglob("*.py") if path != Path(__file__))
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


SOURCE = "\n".join(code_of(package) for package in PACKAGES.values())
TESTS = code_of(ROOT / "tests")


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_is_raised_somewhere_and_asserted_in_a_test(error: str) -> None:
    assert re.search(rf"raise {error}\(", SOURCE), f"nothing raises {error}"
    if error != "SopdeployError":  # the base: only the demo raises it as it is
        assert re.search(rf"raises\(\s*{error}\b", TESTS), f"no test expects {error}"


def test_the_page_of_errors_draws_every_error_once() -> None:
    drawn = re.findall(r"^ \+- (\w+)", errors.__doc__ or "", re.MULTILINE)
    assert sorted([*drawn, "SopdeployError"]) == ERRORS


def test_all_names_what_is_exported_and_nothing_else() -> None:
    assert sopdeploy.__all__ == sorted(sopdeploy.__all__)
    assert all(getattr(sopdeploy, exported) is not None for exported in sopdeploy.__all__)
    source = (ROOT / "sopdeploy" / "__init__.py").read_text(encoding="utf-8")
    lazily = {
        constant.value
        for function in ast.parse(source).body
        if isinstance(function, ast.FunctionDef) and function.name == "__getattr__"
        for comparison in ast.walk(function)
        if isinstance(comparison, ast.Compare)
        for constant in ast.walk(comparison)
        if isinstance(constant, ast.Constant)
    }
    public = {n for n, v in vars(sopdeploy).items() if not n.startswith("_") and not is_inner(n, v)}
    assert lazily | public | {"__version__"} == set(sopdeploy.__all__)


def is_inner(exported: str, value: Any) -> bool:
    """Modules appear once they are imported; `Any` is only for the types."""
    return isinstance(value, ModuleType) or exported == "Any"


def test_the_page_of_the_command_line_is_what_the_code_says() -> None:
    generate = module_at(ROOT / "docs" / "generate.py")
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == generate.cli_page(), "run `make docs`"


def test_the_tables_of_operations_are_what_the_code_says() -> None:
    generate = module_at(ROOT / "docs" / "generate_operations.py")
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert page == generate.operations_page(), "run `make docs`"
    assert [name for name, note in generate.comments().items() if not note] == []


def test_the_page_of_the_networks_names_them_all_with_their_switches() -> None:
    generate = module_at(ROOT / "docs" / "generate_models.py")
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    configs = {item.config for item in generate.CATALOG.values()}
    for part in [*map(generate.config_section, configs), generate.pooling_sections()]:
        assert part in page, "run `make docs`"
    assert [name for name in generate.CATALOG if f"\n| `{name}` |" not in page] == []


@pytest.mark.slow
def test_the_page_of_the_networks_is_what_the_code_counts() -> None:
    generate = module_at(ROOT / "docs" / "generate_models.py")
    assert (ROOT / "docs" / "models.md").read_text(encoding="utf-8") == generate.models_page(), (
        "run `make docs`"
    )


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target for target in LINK.findall(prose) if not re.match(r"[a-z]+:", target)]
    dead = [t for t in targets if not (page.parent / t.partition("#")[0]).exists()]
    assert dead == []


def headings(page: Path) -> set[str]:
    """Return the anchors of *page*, as a forge makes them of its headings."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_to_a_heading_finds_it(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        place, mark, anchor = target.partition("#")
        if mark and not re.match(r"[a-z]+:", target):
            assert anchor in headings(page.parent / place if place else page), target


MENTION = re.compile(r"`((?:sopdeploy|export|service|tests|docs|benchmarks)/[\w/.-]+)`")
WHOLE_TREE = ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md", "docs/bundle.md"]


@pytest.mark.parametrize("page", WHOLE_TREE)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    named = MENTION.findall((ROOT / page).read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


LIGHT = [
    "sopdeploy",
    "sopdeploy.bundle.folder",
    "sopdeploy.bundle.manifest",
    "sopdeploy.images.preprocess",
    "sopdeploy.bundle.probes",
    "sopdeploy.cli.app",
    "sopdeploy_service.commands.predict",
    "sopdeploy_service.server.process",
    "sopdeploy_service.commands.verify",
]


def test_what_a_server_needs_loads_no_torch() -> None:
    code = (
        f"import {', '.join(LIGHT)}, sys\n"
        "print([n for n in ('torch', 'torchvision', 'onnx', 'sklearn', 'timm') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def mentions(pattern: str) -> set[str]:
    return {
        name(path) for path in MODULES if re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    }


def test_only_the_checkpoint_reads_pt_files_and_safely() -> None:
    assert mentions(r"torch\.load\(") == {"sopdeploy/checkpoint.py"}
    assert "weights_only=True" in (ROOT / "sopdeploy" / "checkpoint.py").read_text(encoding="utf-8")
    assert (
        mentions(r"weights_only=False|allow_pickle=True|^import pickle$|(?<![.\w])(?:eval|exec)\(") == set()
    )


def test_only_one_module_imports_onnxruntime_in_the_service() -> None:
    users = mentions(r'import onnxruntime|import(?:_module|ed)\(\s*"onnxruntime')
    users = {path for path in users if "service" in path}
    assert users == {"service/sopdeploy_service/runtime/onnxruntime.py"}
