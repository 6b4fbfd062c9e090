"""The steps of a release run in scratch clones; what needs GitHub, Docker or root is replaced."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import sopdeploy
from tests.deploy.test_workflows import ROOT, jobs

TAG = f"v{sopdeploy.__version__}"
# Programs that record their arguments instead, each with the reason. A step with a program in
# no list fails.
REPLACED = {
    "apt-get": "changes the machine",
    "docker": "needs its daemon",
    "gh": "needs GitHub",
    "make": "slow",
    "npm": "downloads packages",
}
RUN = {"cd", "grep", "gzip", "mkdir", "mv", "rm", "sha256sum"}
ON_GITHUB = {
    "actions/attest-build-provenance": "signs with GitHub's identity",
    "actions/deploy-pages": "publishes the site",
    "actions/setup-python": "installs Python",
    "actions/upload-pages-artifact": "publishes the site",
    "pypa/gh-action-pypi-publish": "publishes the packages",
}
HIDDEN = shutil.ignore_patterns(".*")  # the action leaves out hidden files
STAND_IN = """#!/bin/bash
echo "${0##*/} $*" >> "$CALLS"
case "${0##*/} $*" in
    "docker save "*) echo image ;;
    "make dist "*)
        mkdir dist
        touch dist/.gitignore dist/sopdeploy-1{-py3-none-any.whl,.tar.gz} dist/sbom-{cpu,gpu}.json ;;
esac
"""


def git(folder: Path, *arguments: str | Path) -> str:
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A repository with the files of this checkout, committed or not, and a tag of their version."""
    folder = tmp_path_factory.mktemp("repository")

    for name in git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split(
        "\0"
    )[:-1]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)

    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--message=x")
    git(folder, "tag", TAG)

    yield folder
    shutil.rmtree(folder)


def programs(folder: Path, names: set[str]) -> dict[str, str]:
    """Write stand-ins for *names*; return the environment that finds them, with the file of their calls."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)

    kept = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith(("GITHUB_", "PYTHONPATH"))
    }
    path = f"{folder}:{os.environ['PATH']}"
    return kept | {"PATH": path, "CALLS": str(folder / "calls")}


def called(step: str) -> set[str]:
    """Return the programs that a step calls."""
    return {shlex.split(part)[0] for part in re.split(r"&&|\|\|?|;|\n", step) if part.strip()}


def run_workflow(name: str, repository: Path, tag: str, folder: Path) -> list[str]:
    """Run all jobs of a workflow from *tag*, each in `folder/JOB`; return the calls of replaced programs."""
    environment = programs(folder / "programs", {*REPLACED})
    environment |= {"GITHUB_REF_NAME": tag, "GITHUB_REPOSITORY": "owner/sopdeploy"}

    for job, content in jobs(name).items():
        here = folder / job
        here.mkdir()
        for step in content["steps"]:
            if "run" in step:
                assert called(step["run"]) <= REPLACED.keys() | RUN, (
                    "a program that is in no list above"
                )
                assert "${{" not in step["run"]
                command = ["bash", "-euo", "pipefail", "-c", step["run"]]
                done = subprocess.run(
                    command,
                    cwd=here,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, (
                    f"{job}: {step['run']}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
                )
                continue

            action, path = step["uses"].partition("@")[0], step.get("with", {}).get("path")
            if action == "actions/checkout":
                options = [
                    "--quiet",
                    "--depth=1",
                    f"--branch={tag}",
                    f"file://{repository}",
                    here,
                ]
                git(folder, "-c", "advice.detachedHead=false", "clone", *options)
            elif action == "actions/upload-artifact":
                shutil.copytree(here / path, folder / "artifact", ignore=HIDDEN)
            elif action == "actions/download-artifact":
                shutil.copytree(folder / "artifact", here / path)
            else:
                assert action in ON_GITHUB, "an action that is in no list above"

    return (folder / "programs" / "calls").read_text().splitlines()


def check_release(version: str, folder: Path, calls: list[str]) -> None:
    """Check what the jobs of release.yml built, and what they would publish."""
    names = {path.name for path in (folder / "artifact").iterdir()}
    image = f"sopdeploy-{version}-image-cpu.tar.gz"
    assert names >= {image, "SHA256SUMS", "sbom-cpu.json", "sbom-gpu.json"}
    assert len(names) == 6

    assert {path.name for path in (folder / "publish" / "packages").iterdir()} == {
        name for name in names if name.startswith("sopdeploy-") and name != image
    }
    subprocess.run(
        ["sha256sum", "--check", "SHA256SUMS"], cwd=folder / "build" / "dist", check=True
    )

    listed = " ".join(f"dist/{name}" for name in sorted(names))
    upload = f"gh release create v{version} (.*) --repo owner/sopdeploy --verify-tag --generate-notes"
    uploaded = re.fullmatch(upload, calls[-1])
    assert uploaded
    assert " ".join(sorted(uploaded[1].split())) == listed
    assert f"docker build --target cpu --tag sopdeploy:{version} ." in calls


def test_a_release_publishes_what_it_has_built(repository: Path, tmp_path: Path) -> None:
    check_release(TAG[1:], tmp_path, run_workflow("release.yml", repository, TAG, tmp_path))


def test_a_tag_of_another_version_is_not_released(repository: Path, tmp_path: Path) -> None:
    git(repository, "tag", "--force", "v0.0.1")
    with pytest.raises(AssertionError, match="grep"):
        run_workflow("release.yml", repository, "v0.0.1", tmp_path)
