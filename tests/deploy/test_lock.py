"""The locks have one allowed version of everything, without a host, and targets install from them."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "deploy" / "lock"
TABLES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = TABLES["project"]["optional-dependencies"]
GROUPS: dict[str, list[str]] = TABLES["dependency-groups"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
INSTALLED = re.findall(r"^EXTRAS := (.+)$", MAKEFILE, re.MULTILINE)[0].split()
PYTHONS = ("3.11.9", "3.12.9", "3.13.2")
MACHINES = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))

# Every variable of pip and uv that selects versions, and those of a `make` around the tests.
SELECTS = re.compile(r"(?:UV|PIP)_(?:CONSTRAINT|BUILD_CONSTRAINT|RESOLUTION)=(.*)")

OUTER = re.compile(r"UV_|PIP_|MAKE|MFLAGS|NEWEST|LOWEST")


def lock(name: str) -> list[Requirement]:
    """Read the packages of deploy/lock/NAME.txt without their hashes."""
    lines = (LOCKS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line.rstrip(" \\")) for line in lines if line[:1] not in ("", " ", "#")]


def environment(python: str, platform: str, machine: str) -> dict[str, str]:
    """Return what markers read, for CPython."""
    short = ".".join(python.split(".")[:2])
    versions = {
        "python_full_version": python,
        "python_version": short,
        "implementation_version": python,
    }
    implementation = {
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    return {
        **versions,
        **implementation,
        "sys_platform": platform,
        "platform_machine": machine,
        "os_name": "posix",
    }


def applies(marker: Marker | None, to: dict[str, str]) -> bool:
    return marker is None or marker.evaluate({**to, "extra": ""})


DEVELOPMENT = [
    *TABLES["project"]["dependencies"],
    *(r for extra in INSTALLED for r in EXTRAS[extra]),
]
LOCKED = {
    "dev": [*DEVELOPMENT, *GROUPS["build"], *GROUPS["tools"]],
    "build": GROUPS["build"],
    "cuda-stand-in": GROUPS["cuda-stand-in"],
}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("platform", "machine"), MACHINES)
@pytest.mark.parametrize("name", LOCKED)
def test_a_lock_has_one_allowed_version_of_every_requirement(
    name: str, platform: str, machine: str, python: str
) -> None:
    here = environment(python, platform, machine)
    pinned: dict[str, str] = {}
    for entry in lock(name):
        if applies(entry.marker, here):
            assert canonicalize_name(entry.name) not in pinned, entry
            [version] = entry.specifier
            assert version.operator == "=="
            pinned[canonicalize_name(entry.name)] = version.version

    for requirement in map(Requirement, LOCKED[name]):
        if applies(requirement.marker, here):
            version_here = pinned.get(canonicalize_name(requirement.name))
            assert version_here is not None, requirement
            assert requirement.specifier.contains(version_here, prereleases=True), requirement


@pytest.mark.parametrize("path", sorted(LOCKS.iterdir()), ids=lambda path: path.name)
def test_a_lock_names_no_host(path: Path) -> None:
    assert not re.search(r"://|@ |--(?:extra-)?index", path.read_text(encoding="utf-8"))


def test_the_lock_of_the_javascript_sample_has_packages_by_hash() -> None:
    folder = ROOT / "deploy" / "samples" / "javascript"
    text = (folder / "package-lock.json").read_text(encoding="utf-8")
    _, *packages = json.loads(text)["packages"].items()

    assert all(package["integrity"].startswith("sha512-") for _, package in packages)

    wanted = json.loads((folder / "package.json").read_text(encoding="utf-8"))["dependencies"]
    found = {
        path.removeprefix("node_modules/"): package["version"] for path, package in packages
    }

    assert {name: found[name] for name in wanted} == wanted
    assert "://" not in text


def make(*arguments: str) -> str:
    """Run make with a further target `selection` that prints the variables of a recipe."""
    outer = {name: value for name, value in os.environ.items() if not OUTER.match(name)}
    return subprocess.run(
        ["make", "--file=Makefile", "--file=-", "--no-print-directory", *arguments],
        input="selection:\n\t@env; echo environment $(VENV)\n",
        env=outer,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize(
    ("arguments", "folder", "selected"),
    [
        ([], ".venv", {"deploy/lock/dev.txt"}),
        (["NEWEST=1"], ".venv-newest", set()),
        (["LOWEST=1"], ".venv-lowest", {"lowest-direct"}),
    ],
)
def test_the_recipes_install_the_selected_versions(
    arguments: list[str], folder: str, selected: set[str]
) -> None:
    printed = make("selection", *arguments).splitlines()
    values = [found[1] for line in printed if (found := SELECTS.fullmatch(line))]
    assert set(values) == selected
    assert len(values) == {"deploy/lock/dev.txt": 4, "lowest-direct": 1}.get(
        "".join(selected), 0
    )
    assert printed[-1] == f"environment {folder}"

    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert {".venv/", ".venv-*/"} <= set(ignored)
    assert folder in re.findall(r"^clean:.*\n\t(.*)", MAKEFILE, re.MULTILINE)[0].split()


SCRIPTS = [ROOT / "Dockerfile", *sorted((ROOT / "deploy").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_install_python_packages_from_a_lock_only(path: Path) -> None:
    text = re.sub(r"\\\n|^\s*#.*\n", " ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = re.findall(r"(?:\bpip |^ *)(?:wheel|install)\b +-.*?(?:$|&&)", text, re.MULTILINE)

    assert [
        line
        for line in found
        if not re.search(r"--(?:require-hashes|no-index|constraint)\b", line)
    ] == []
