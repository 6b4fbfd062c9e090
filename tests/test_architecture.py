"""Structure of the project that linters and import contracts do not check."""

import ast
import functools
import inspect
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import grimp
import pytest

import sopdeploy
from sopdeploy_commands.app import COMMANDS
from tests.support.rooms import PACKAGES, PYTHONPATH, ROOT

TEXT = {
    ".py",
    ".md",
    ".toml",
    ".yml",
    ".yaml",
    ".sh",
    ".html",
    ".css",
    ".js",
    ".json",
    ".cfg",
    "",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked_text_files() -> list[Path]:
    """Return the text files that git tracks or would track; without git, all of them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        skip = {".venv", "dist", "build", "runs", "bundles", "demo", ".git"}
        paths = [
            path for path in ROOT.rglob("*") if not skip & set(path.relative_to(ROOT).parts)
        ]
    else:
        paths = [ROOT / line for line in found.stdout.splitlines()]
    return sorted(path for path in paths if path.is_file() and path.suffix in TEXT)


TEXT_FILES = tracked_text_files()
PAGES = [path for path in TEXT_FILES if path.suffix == ".md"]


# /mnt/models is where KServe mounts a model, on every machine.
LOCAL_PATH = re.compile(r"(?<![\w.$}~*])/(?:home|tmp|root|Users|mnt(?!/models\b))/\w")


def test_no_file_contains_a_path_of_one_machine() -> None:
    found = [
        f"{name(path)}:{number}"
        for path in TEXT_FILES
        if "tests" not in path.relative_to(ROOT).parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if LOCAL_PATH.search(line)
    ]
    assert found == []


BY_NAME = re.compile(
    r"""\b(?:pip3?|pipx|uvx?)\b.*[\s"'`=]sopdeploy(?:-papers)?(?:[\[=<>~\s"'`]|$)|\bsopdeploy\["""
)
# What an image or a checkout has already installed when pip reads this.
INSTALLED_BEFORE = re.compile(
    r"REQUIREMENTS=\"sopdeploy\[|^[\w-]+ = \[.*\"sopdeploy\[|^ +\".*\"sopdeploy\["
)


def installs_by_name(line: str) -> bool:
    return bool(BY_NAME.search(line)) and not INSTALLED_BEFORE.search(line)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('pip install "sopdeploy[cpu]"', True),
        ("pip install sopdeploy", True),
        ("run: pip install sopdeploy-papers", True),
        ("uv pip install 'sopdeploy==0.4.0'", True),
        ('pip install --find-links wheels "sopdeploy[gpu,tensorrt]"', True),
        ("uvx sopdeploy demo", True),
        ("install sopdeploy[gpu]", True),
        ('pip install ".[cpu]"', False),
        ('pip install ".[train]" ./plugins/papers', False),
        ('pip install "$(ls dist/sopdeploy-*.whl)[cpu]"', False),
        ('docker build --build-arg REQUIREMENTS="sopdeploy[openvino]" .', False),
    ],
)
def test_an_installation_by_name_is_recognised(line: str, expected: bool) -> None:
    assert installs_by_name(line) == expected


def test_no_line_installs_this_project_by_its_name() -> None:
    """The name is free on the package index: it would install whatever a stranger puts there."""
    found = [
        f"{name(path)}:{number}: {line}"
        for path in TEXT_FILES
        if "tests" not in path.relative_to(ROOT).parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if installs_by_name(line)
    ]

    assert found == []


def test_a_release_raises_the_version_in_each_file_that_states_it() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    raised = {file["filename"] for file in settings["tool"]["bumpversion"]["files"]}
    version = re.escape(sopdeploy.__version__)
    stated = re.compile(
        rf'(?:version(?:__)? ?[:=] ?"?|\btag: |\bsopdeploy:){version}\b', re.IGNORECASE
    )
    stating = {
        name(path)
        for path in TEXT_FILES
        if "tests" not in path.relative_to(ROOT).parts
        and stated.search(path.read_text(encoding="utf-8"))
    }

    assert len(stating) > 5
    assert stating - raised == {"pyproject.toml"}  # which the release changes itself


def test_an_image_of_this_project_has_the_version_that_a_release_raises() -> None:
    bump = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "bumpversion"
    ]
    version = sopdeploy.__version__
    raised = {
        (entry["filename"], entry["search"].format(current_version=version))
        for entry in bump["files"]
    }
    named = {
        (name(path), found)
        for path in TEXT_FILES
        if not {"tests", "CHANGELOG.md"} & {*path.relative_to(ROOT).parts}
        for found in re.findall(
            r"(?:\btag: |\bimage\.tag=|\bsopdeploy:)\d+\.\d+\.\d+",
            path.read_text(encoding="utf-8"),
        )
    }

    assert len(named) > 4
    assert named - raised == set()


def test_dunder_all_names_exactly_the_lazy_exports() -> None:
    assert sopdeploy.__all__ == sorted(sopdeploy.__all__)
    assert all(getattr(sopdeploy, exported) is not None for exported in sopdeploy.__all__)

    lazy = set(sopdeploy.__all__) - {"__version__"}
    assert all(getattr(sopdeploy, exported).__doc__[0].isupper() for exported in lazy)
    assert lazy <= set(dir(sopdeploy))  # for completion
    assert [
        name for name in lazy if (ROOT / "sopdeploy" / name).exists()
    ] == []  # no submodule hides one
    with pytest.raises(AttributeError, match="no attribute 'create_modl'"):
        _ = sopdeploy.create_modl


# A command so far
SUGGESTED = re.compile(rf'(sopdeploy ({"|".join(COMMANDS)}) |run: \w+ )[^;`("\n]*\Z')


@pytest.mark.parametrize("package", ["sopdeploy", "service", "export", "commands", "plugins"])
def test_the_words_of_suggested_commands_are_quoted(package: str) -> None:
    unquoted = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for text in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            before = ""
            for part in text.values if isinstance(text, ast.JoinedStr) else ():
                if isinstance(part, ast.Constant):
                    before += str(part.value)
                elif SUGGESTED.search(before) and not ast.unparse(part.value).startswith(
                    ("quote(", "join(")
                ):
                    unquoted.append(
                        f"{path.relative_to(ROOT)}:{text.lineno}: {ast.unparse(part.value)}"
                    )

    assert unquoted == []


BROAD = re.compile(r"^ *except (?:Base)?Exception\b(?!.*: +# [\w`]).*", re.MULTILINE)


@pytest.mark.parametrize("package", PACKAGES.values(), ids=name)
def test_a_handler_of_every_exception_says_why(package: Path) -> None:
    texts = {
        name(path): path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))
    }
    assert {path: found for path, text in texts.items() if (found := BROAD.findall(text))} == {}


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MENTION = re.compile(
    r"`((?:sopdeploy|export|service|commands|plugins|tests|docs|benchmarks)/[\w/.-]+)`"
)


def anchors(page: Path) -> set[str]:
    """Return the anchors that a forge derives from the headings of *page*."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_and_every_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in [
        target for target in LINK.findall(prose) if not re.match(r"[a-z]+:", target)
    ]:
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target
    named = MENTION.findall(text) if page.name != "CHANGELOG.md" else []

    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "README.md"])
def test_a_page_that_everybody_reads_is_short(page: str) -> None:
    assert len((ROOT / page).read_text(encoding="utf-8").split()) <= 700


def imports_of(path: Path) -> set[str]:
    """List the top-level packages that a module imports anywhere: in functions and for type checks, too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    return names


def test_one_module_decides_which_names_are_alike() -> None:
    paths = [path for folder in PACKAGES.values() for path in sorted(folder.rglob("*.py"))]
    found = [name(path) for path in paths if "difflib" in imports_of(path)]

    assert found == ["sopdeploy/base/nearest.py"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout of git")
def test_no_file_of_the_project_is_ignored_which_a_wheel_would_lack() -> None:
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

    assert found.stdout.splitlines() == []


def test_a_child_process_of_a_test_imports_the_packages_of_this_checkout(
    tmp_path: Path,
) -> None:
    find = f"print(*[importlib.util.find_spec(name).origin for name in {list(PACKAGES)}], sep='\\n')"
    command = [sys.executable, "-c", f"import importlib.util; {find}"]
    paths = {"PYTHONPATH": PYTHONPATH}
    found = subprocess.run(
        command, cwd=tmp_path, env=paths, capture_output=True, text=True, check=True
    )

    assert found.stdout.splitlines() == [
        str(folder / "__init__.py") for folder in PACKAGES.values()
    ]


def test_the_stub_of_the_package_has_the_public_names_at_their_places() -> None:
    stub = ast.parse((ROOT / "sopdeploy" / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    typed = {alias.asname: str(node.module) for node in imports for alias in node.names}

    assert typed.keys() == {*sopdeploy.__all__, "layers"}
    for exported, module in typed.items():
        public = getattr(sopdeploy, exported)  # checks arguments before it calls the other one
        there = getattr(import_module(module), exported)
        assert inspect.unwrap(public) is inspect.unwrap(there)


ROOTS = (
    ".",
    "service/sopdeploy_service",
    "export/sopdeploy_export",
    "commands/sopdeploy_commands",
)


def test_the_files_of_the_three_stories_exist() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    story = page.partition("## Three stories")[2].partition("\n## Where")[0]
    named = re.findall(r"`([\w/]+/\w+\.py)`", story)

    assert len(named) > 20
    assert [
        path for path in named if not any((ROOT / root / path).is_file() for root in ROOTS)
    ] == []


HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "sklearn", "timm", "sopdeploy_export")
# Modules, and the packages that importing them must not import
WITHOUT: dict[tuple[str, ...], tuple[str, ...]] = {
    (
        *(
            "sopdeploy",
            "sopdeploy.bundle.manifest",
            "sopdeploy.bundle.probes",
            "sopdeploy_commands.app",
        ),
        *(
            "sopdeploy.client.client",
            "sopdeploy.images.preprocess",
            "sopdeploy_commands.predict",
        ),
        *("sopdeploy_commands.verify", "sopdeploy_commands.scores"),
        *("sopdeploy_service.server.process", "sopdeploy_service.app"),
    ): HEAVY,
    ("sopdeploy_commands.app",): ("importlib.metadata", "rich", "pydantic", "numpy", "fastapi"),
    ("sopdeploy.models.registry", "sopdeploy.training.settings.recipe"): ("torch", "timm"),
    ("sopdeploy_service.devices.supervisor",): ("numpy", "fastapi"),
}


@pytest.mark.parametrize("modules", WITHOUT, ids=lambda modules: modules[0])
def test_modules_do_not_import_heavy_packages(modules: tuple[str, ...]) -> None:
    code = f"import {', '.join(modules)}, sys; print([n for n in {WITHOUT[modules]} if n in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )

    assert found.stdout.strip() == "[]"


@functools.cache
def imports() -> dict[str, set[str]]:
    """List the modules of the packages that each module imports, also in functions and for types."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def test_no_file_imports_another_in_a_circle() -> None:
    """Imports of functions and those for types alone count, which import contracts do not see."""
    TopologicalSorter(imports()).prepare()  # raises `CycleError`, which names the files


def test_the_exporter_imports_no_network_of_a_paper() -> None:
    ours = (
        found for module, found in imports().items() if module.startswith("sopdeploy_export")
    )
    models = {name for name in set().union(*ours) if name.startswith("sopdeploy.models")}

    assert models == {
        "sopdeploy.models.backbones.base",
        "sopdeploy.models.base",
        "sopdeploy.models.describe",
        "sopdeploy.models.timm_networks",
    }
