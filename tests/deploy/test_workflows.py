"""Workflows call what exists, the version is equal everywhere, and the wheel resolves with every extra."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml

import sopdeploy

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
WORKFLOWS = {path.name: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def jobs(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf-8"))["jobs"])


@pytest.mark.parametrize("name", WORKFLOWS)
def test_steps_call_existing_targets_and_files_and_pinned_actions(name: str) -> None:
    found = jobs(name)
    assert all(
        need in found
        for job in found.values()
        for need in [job.get("needs", next(iter(found)))]
    )

    steps = [step for job in found.values() for step in job["steps"]]
    made = [
        target
        for step in steps
        for targets in re.findall(r"^make ([\w -]+?)(?: [A-Z]+=1)*$", step.get("run", ""), re.M)
        for target in targets.split()
    ]

    assert made
    assert set(made) <= TARGETS
    uses = re.findall(r"uses: (.*)", WORKFLOWS[name].read_text(encoding="utf-8"))
    pinned = r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+"

    assert [action for action in uses if not re.fullmatch(pinned, action)] == []
    for step in steps:
        assert ("run" in step) != ("uses" in step)
        named = re.findall(r"\b(?:sopdeploy|deploy)/[\w./-]+\w", step.get("run", ""))
        assert [path for path in named if not (ROOT / path).exists()] == []


def test_only_the_job_that_publishes_may_request_an_identity_for_the_index() -> None:
    found = jobs("release.yml")

    assert {name for name, job in found.items() if job.get("environment") == "pypi"} == {
        "publish"
    }
    assert found["publish"]["permissions"] == {"id-token": "write"}
    assert not re.search(r"secrets\.", WORKFLOWS["release.yml"].read_text(encoding="utf-8"))


def test_a_tag_of_another_version_is_not_released() -> None:
    steps = jobs("release.yml")["build"]["steps"]
    (check,) = [
        step["run"] for step in steps if step.get("name", "").startswith("The tag names")
    ]

    for tag, code in ((f"v{sopdeploy.__version__}", 0), ("v0.0.1", 1)):
        command = ["bash", "-euo", "pipefail", "-c", check]
        environment = {**os.environ, "GITHUB_REF_NAME": tag}
        assert (
            subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == code
        )


def test_the_files_that_a_release_changes_have_the_version() -> None:
    bump = PROJECT["tool"]["bumpversion"]
    version = bump["current_version"]
    assert version == sopdeploy.__version__

    for entry in bump["files"]:
        text = entry["search"].format(current_version=version)
        searched = text if entry.get("regex") else re.escape(text)
        file = ROOT / entry["filename"]
        assert re.search(searched, file.read_text(encoding="utf-8")), entry


EXTRAS = PROJECT["project"]["optional-dependencies"]
PYTHONS = ("3.11", "3.12", "3.13")
LINUX = "x86_64-manylinux_2_28"
ARM = "aarch64-manylinux_2_28"
MACOS = "aarch64-apple-darwin"
OLDEST_MACOS = "14.0"  # of onnxruntime
ARM_OF_OPENVINO = "aarch64-manylinux_2_35"
PLATFORMS = {
    "cpu": (LINUX, ARM, MACOS),
    "train": (LINUX, ARM, MACOS),
    "dev": (LINUX, ARM_OF_OPENVINO, MACOS),
}
UV = Path(sys.executable).with_name("uv")
# In messages of uv, and of packages that download their wheel from a server of their own.
UNREACHABLE = r"error sending request|dns error|no longer available offline|urlopen\s+error"


def checked(*command: str | Path, stdin: str = "") -> str:
    """Run *command*, which must succeed, and return its output; skip if it needs a server that it cannot reach."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode and re.search(UNREACHABLE, done.stderr):
        pytest.skip("a server of packages cannot be reached")
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheels into a folder; skip without uv or a package index."""
    out = tmp_path_factory.mktemp("index")
    if not UV.is_file():
        pytest.skip("uv is not installed")
    for project in (ROOT, ROOT / "plugins" / "papers"):
        checked(UV, "build", "--quiet", "--wheel", "--out-dir", out, project)
    return out


@pytest.mark.nightly
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_resolves(
    extra: str, python: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UV_CONSTRAINT", raising=False)  # make exports the lock
    monkeypatch.setenv("MACOSX_DEPLOYMENT_TARGET", OLDEST_MACOS)
    for platform in PLATFORMS.get(extra, (LINUX,)):
        command = [
            UV,
            "pip",
            "compile",
            "--quiet",
            "--no-header",
            "--no-annotate",
            "--find-links",
            folder,
        ]
        command += ["--python-version", python, "--python-platform", platform, "-"]
        wanted = f"sopdeploy[{extra}]=={sopdeploy.__version__}"
        lines = checked(*command, stdin=wanted).splitlines()
        resolved = {re.split(r"[=@ ;]", line)[0].lower() for line in lines}
        direct = {
            re.split(r"[\[<>=!~; ]", line)[0].lower()
            for line in PROJECT["project"]["dependencies"]
        }
        assert direct | {"sopdeploy"} <= resolved


NVIDIA = {"tensorrt", "torch-tensorrt"}  # need packages of NVIDIA's index


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("installer", ["pip", "uv"])
@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - NVIDIA))
def test_the_wheel_installs_with(
    extra: str, installer: str, python: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("PYTHONPATH", "UV_CONSTRAINT", "PIP_CONSTRAINT"):  # make exports the lock
        monkeypatch.delenv(variable, raising=False)
    find = [UV, "python", "find", "--no-project", "--no-python-downloads", python]
    found = subprocess.run(find, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"Python {python} is not installed")

    with TemporaryDirectory() as environment:
        checked(
            UV,
            "venv",
            "--quiet",
            "--seed",
            "--clear",
            "--python",
            found.stdout.strip(),
            environment,
        )
        of_environment = Path(environment) / "bin" / "python"
        pip = (of_environment, "-m", "pip")
        uv_install = (
            UV,
            "pip",
            "install",
            "--python",
            of_environment,
            "--torch-backend",
            "cpu",
        )
        install = (*pip, "install") if installer == "pip" else uv_install
        wanted = f"sopdeploy[{extra}]=={sopdeploy.__version__}"
        checked(*install, "--quiet", "--find-links", folder, wanted)
        checked(*pip, "check")

        assert (
            checked(of_environment.with_name("sopdeploy"), "--version").split()[-1]
            == sopdeploy.__version__
        )
