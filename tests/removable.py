"""Check that optional parts can be removed; `make removable` calls it for all of them.

    python tests/removable.py [PART ...]

For each part, copy the tree and delete the part's folders, its tests and its line of registration. Then no
module may import what is gone, every module must be importable, and the unit tests must pass.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"sopdeploy": ".", "sopdeploy_export": "export", "sopdeploy_service": "service"}
UNIT_TESTS = (
    "tests/sopdeploy/layers",
    "tests/sopdeploy/images",
    "tests/sopdeploy/bundle",
    "tests/service/http",
)


@dataclass(frozen=True)
class Part:
    """Paths (globs) that belong to a part only, and the file that registers it with the text of that line."""

    paths: tuple[str, ...]
    registered_in: str
    line: str
    needed_by: tuple[str, ...] = ()  # other optional parts, which go, too
    api: str = ""  # the module of a function that `sopdeploy/__init__.py` exports, in two lines


CLI = "sopdeploy/cli/app.py"
PARTS = {
    "few_shot": Part(
        ("sopdeploy/training/few_shot", "tests/sopdeploy/training/test_few_shot*"),
        "sopdeploy/training/recipe.py",
        '"few_shot": "',
    ),
    "reproduction": Part(
        ("sopdeploy/reproduction", "sopdeploy/cli/training/reproduce.py", "tests/sopdeploy/reproduction"),
        CLI,
        '"reproduce": (',
    ),
    "importers": Part(
        ("sopdeploy/importers", "sopdeploy/cli/training/import_weights.py", "tests/sopdeploy/importers"),
        CLI,
        '"import": (',
    ),
    "batch": Part(
        (
            "service/sopdeploy_service/commands/batch",
            "sopdeploy/cli/serving/classify.py",
            "tests/service/commands/batch",
        ),
        CLI,
        '"classify": (',
        api="sopdeploy_service.commands.batch.run",
    ),
    "on_ray": Part(
        (
            "service/sopdeploy_service/server/on_ray",
            "sopdeploy/cli/serving/ray.py",
            "tests/service/server/on_ray",
        ),
        CLI,
        '"ray": (',
    ),
    "front_ends": Part(
        ("service/sopdeploy_service/front_ends", "tests/service/front_ends"),
        "service/sopdeploy_service/server/process.py",
        "front_ends",
    ),
    "shadow": Part(
        ("service/sopdeploy_service/shadow.py", "tests/service/test_shadow.py"),
        "service/sopdeploy_service/app.py",
        "shadow",
    ),
    "doctor": Part(
        (
            "sopdeploy/doctor",
            "sopdeploy/cli/serving/doctor.py",
            "tests/sopdeploy/doctor",
            "tests/**/test_doctor.py",
        ),
        CLI,
        '"doctor": (',
    ),
    "comparison": Part(
        (
            "sopdeploy/comparison.py",
            "sopdeploy/cli/training/compare.py",
            "tests/sopdeploy/evaluation/test_compare.py",
        ),
        CLI,
        '"compare": (',
    ),
    "client": Part(
        ("sopdeploy/client", "sopdeploy/evaluation/service.py", "tests/sopdeploy/client"),
        "sopdeploy/api/evaluation.py",
        "sopdeploy.evaluation.service",
        needed_by=("doctor",),
    ),
    "tensorrt": Part(
        (
            "sopdeploy/tensorrt",
            "sopdeploy/cli/deployment/engine.py",
            "export/sopdeploy_export/engine_builder",
            "service/sopdeploy_service/runtime/tensorrt.py",
            "tests/tensorrt",
        ),
        CLI,
        '"engine": (',
    ),
    "triton": Part(
        (
            "export/sopdeploy_export/triton.py",
            "sopdeploy/cli/deployment/triton.py",
            "tests/tensorrt/test_triton.py",
        ),
        CLI,
        '"triton": (',
    ),
}


def modules(tree: Path) -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the file of every module of the three packages."""
    for package, folder in PACKAGES.items():
        for path in sorted((tree / folder / package).rglob("*.py")):
            parts = path.relative_to(tree / folder).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of all imports of a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def copy_without(part: Part, tree: Path) -> list[str]:
    """Copy the project to `tree` without the part; return what prevents its removal."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        source = ROOT / name
        if source.is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(source.read_bytes())
    before = {name for name, _ in modules(tree)}
    for gone in (part, *(PARTS[name] for name in part.needed_by)):
        problems = remove(gone, tree)
        if problems:
            return problems
    removed = before - {name for name, _ in modules(tree)}
    return [
        f"{path.relative_to(tree)}:{line} imports {name}"
        for _, path in modules(tree)
        for line, name in imported_names(path)
        if name in removed
    ]


def remove(part: Part, tree: Path) -> list[str]:
    """Delete the paths and the registration of a part from the copy; return what prevents it."""
    for pattern in part.paths:
        matches = list(tree.glob(pattern))
        if not matches:
            return [f"{pattern}: no such path"]
        for path in matches:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    registrations = [(part.registered_in, part.line, 1)]
    if part.api:
        registrations.append(("sopdeploy/__init__.py", part.api, 2))
    for file, text, expected in registrations:
        lines = (tree / file).read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if text not in line]
        if len(lines) - len(kept) != expected:
            return [f"{file}: {len(lines) - len(kept)} lines contain {text}, expected {expected}"]
        (tree / file).write_text("".join(kept), encoding="utf-8")
    return []


def problems_without(part: Part, tree: Path, tests: list[str]) -> list[str]:
    """Return why the project does not work without the part; empty if it does."""
    problems = copy_without(part, tree)
    if problems:
        return problems
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(tree / folder) for folder in PACKAGES.values()),
        "OMP_NUM_THREADS": "1",
    }
    names = [name for name, _ in modules(tree) if not name.endswith("__main__")]
    importing = f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    for command in (
        ["-c", importing],
        ["-m", "pytest", "-q", "-x", "-n", "2", "-p", "no:cacheprovider", *tests],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            return (done.stdout + done.stderr).splitlines()[-15:]
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
