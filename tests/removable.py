"""Check that optional parts can be removed; `make removable` calls it for all of them.

    python tests/removable.py [PART ...]

For each part, copy the tree, delete the part's folders and its tests, and the lines of `pyproject.toml` that
register them. Then no module may import what is gone, every module must be importable, and all tests of the
packages must pass, except those that import the part or are marked with `part`.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"sopdeploy": ".", "sopdeploy_export": "export", "sopdeploy_service": "service"}
WITH_TESTS = {**PACKAGES, "tests": "."}
UNIT_TESTS = tuple(
    f"tests/{name}" for name in ("sopdeploy", "export", "service", "sweep", "attacks", "plugin")
)


@dataclass(frozen=True)
class Part:
    """Paths (globs) that belong to a part only."""

    paths: tuple[str, ...]
    needed_by: tuple[str, ...] = ()  # other optional parts, which go, too


PARTS = {
    "few_shot": Part(("sopdeploy/training/few_shot", "tests/sopdeploy/training/test_few_shot*")),
    "reproduction": Part(
        ("sopdeploy/reproduction", "sopdeploy/cli/training/reproduce.py", "tests/sopdeploy/reproduction")
    ),
    "importers": Part(
        ("sopdeploy/importers", "sopdeploy/cli/training/import_weights.py", "tests/sopdeploy/importers")
    ),
    "batch": Part(
        (
            "service/sopdeploy_service/commands/batch",
            "sopdeploy/cli/serving/classify.py",
            "tests/service/commands/batch",
        )
    ),
    "front_ends": Part(("service/sopdeploy_service/front_ends", "tests/service/front_ends")),
    "labelling": Part(
        (
            "service/sopdeploy_service/labelling",
            "sopdeploy/cli/serving/label.py",
            "tests/service/labelling",
        )
    ),
    "doctor": Part(
        (
            "sopdeploy/doctor.py",
            "sopdeploy/cli/serving/doctor.py",
            "tests/sopdeploy/doctor",
            "tests/**/test_doctor.py",
        )
    ),
    "recipe_comparison": Part(
        (
            "sopdeploy/recipe_comparison.py",
            "sopdeploy/cli/training/compare_recipes.py",
            "tests/sopdeploy/evaluation/test_compare_recipes.py",
        )
    ),
    "client": Part(
        ("sopdeploy/client", "sopdeploy/evaluation/service.py", "tests/sopdeploy/client"),
        needed_by=("doctor",),
    ),
    "tensorrt": Part(
        (
            "sopdeploy/tensorrt",
            "sopdeploy/cli/deployment/engine.py",
            "export/sopdeploy_export/engine_builder",
            "service/sopdeploy_service/runtime/tensorrt.py",
            "tests/tensorrt",
        )
    ),
    "triton": Part(
        (
            "export/sopdeploy_export/triton.py",
            "sopdeploy/cli/deployment/triton.py",
            "tests/tensorrt/test_triton.py",
        )
    ),
}


def modules(tree: Path, packages: Mapping[str, str] = PACKAGES) -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the file of every module of *packages*, by default of the three packages."""
    for package, folder in packages.items():
        for path in sorted((tree / folder / package).rglob("*.py")):
            parts = path.relative_to(tree / folder).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported_names(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of all imports in *tree*, a part of the file at *path*."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or path.stem
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def copy_without(part: Part, tree: Path) -> set[str]:
    """Copy the project to `tree` without the files of the part; return the names of the deleted modules."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        source = ROOT / name
        if source.is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(source.read_bytes())
    before = {name for name, _ in modules(tree, WITH_TESTS)}
    for pattern in [path for gone in (part, *map(PARTS.get, part.needed_by)) if gone for path in gone.paths]:
        matches = list(tree.glob(pattern))
        if not matches:
            sys.exit(f"{pattern}: no such path")
        for path in matches:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return before - {name for name, _ in modules(tree, WITH_TESTS)}


def unregister(removed: set[str], tree: Path) -> None:
    """Delete the entry points that name *removed* modules; write the metadata that an installation has."""
    file = tree / "pyproject.toml"
    named = tuple(f'= "{name}{end}' for name in removed for end in ':"')
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    text = "".join(line for line in lines if not any(value in line for value in named))
    file.write_text(text, encoding="utf-8")
    found = distribution("sopdeploy")
    folder = tree / f"sopdeploy-{found.version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(found.read_text("METADATA") or "", encoding="utf-8")
    with (folder / "entry_points.txt").open("w", encoding="utf-8") as output:
        for group, points in tomllib.loads(text)["project"]["entry-points"].items():
            output.write(
                "".join([f"[{group}]\n", *(f"{name} = {value}\n" for name, value in points.items())])
            )


def tests_of_others(removed: set[str], tree: Path) -> list[str]:
    """Delete the test files that import *removed* modules; return pytest's options for single such tests."""
    gone, options = set(removed), []
    files = sorted([*(tree / "tests").rglob("*.py"), *(tree / "benchmarks").glob("*.py")])
    while True:  # a test file may import another one, or a benchmark
        found = [path for path in files if path.exists() and imports_at_start(path, gone)]
        if not found:
            break
        for path in found:
            parts = path.relative_to(tree).with_suffix("").parts
            gone.add(parts[-1] if parts[0] == "benchmarks" else ".".join(parts))
            path.unlink()
    for path in (path for path in files if path.exists() and path.name.startswith("test_")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any(
                name in gone for _, name in imported_names(node, path)
            ):
                options += ["--deselect", f"{path.relative_to(tree)}::{node.name}"]
    return options


def imports_at_start(path: Path, names: set[str]) -> bool:
    """Check whether the file at *path* imports one of *names* outside of functions."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    statements = ast.Module([node for node in body if not isinstance(node, ast.FunctionDef)], [])
    return any(name in names for _, name in imported_names(statements, path))


def problems_without(part: Part, tree: Path, tests: list[str]) -> list[str]:
    """Return why the project does not work without the part; empty if it does."""
    removed = copy_without(part, tree)
    unregister(removed, tree)
    problems = [
        f"{path.relative_to(tree)}:{line} imports {name}"
        for _, path in modules(tree)
        for line, name in imported_names(ast.parse(path.read_text(encoding="utf-8")), path)
        if name in removed
    ]
    if problems:
        return problems
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(tree / folder) for folder in PACKAGES.values()),
        "OMP_NUM_THREADS": "1",
    }
    names = [name for name, _ in modules(tree) if not name.endswith("__main__")]
    importing = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    workers = str((os.cpu_count() or 1) + 1)  # as `make tests`
    options = ["-q", "-rfE", "--maxfail=20", "-n", workers, "--dist", "loadfile", "-p", "no:cacheprovider"]
    options += tests_of_others(removed, tree)
    for command in (["-c", importing], ["-m", "pytest", *options, *tests]):
        done = subprocess.run(
            [sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            return (done.stdout + done.stderr).splitlines()[-30:]
    return []


def main() -> None:
    """Check the parts that are named on the command line, or all; exit with 1 if one cannot be removed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--tests", nargs="+", default=UNIT_TESTS, help="tests that must pass without a part")
    options = parser.parse_args()
    removable = True
    for name in options.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            problems = problems_without(PARTS[name], Path(folder), options.tests)
        sys.stdout.write(
            "\n  ".join([f"{name}: {'cannot' if problems else 'can'} be removed", *problems]) + "\n"
        )
        removable &= not problems
    sys.exit(not removable)


if __name__ == "__main__":
    main()
