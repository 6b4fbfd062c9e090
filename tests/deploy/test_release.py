"""Releases in a temporary repository: preconditions, results, and atomicity."""

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import release
import repository
import version
from builders import choose_builder

from sopdeploy.bundle.signing import check_message, make_key, read_public

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
ROOT = Path(__file__).parents[2]
LINES = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- A thing.\n\n## [0.1.0] - 2026-01-01\n\n- All.\n"
NAMES = {"sopdeploy-0.2.0.tar.gz", "sopdeploy-0.2.0-py3-none-any.whl", "sbom-cpu.json", "sbom-gpu.json"}


def git(root: Path, *words: str) -> str:
    found = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def commit(root: Path, message: str) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", message)


def fake_build(source: Path, folder: Path, tools: Path) -> None:
    """Write a fake sdist and wheel that contain the version of *source*."""
    found = version.current_version(source)
    for end in (".tar.gz", "-py3-none-any.whl"):
        (folder / f"sopdeploy-{found}{end}").write_text(found)


class FakeBuilder:
    """Saves the list of source files as the image."""

    base = "a base"

    def build(self, source: Path, target: str) -> None:
        self.files = sorted(path.name for path in source.iterdir())

    def save(self, path: Path) -> None:
        path.write_text(" ".join(self.files))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository on main with the release 0.1.0 and a new changelog entry."""
    root = tmp_path / "repository"
    for name, forms in version.PLACES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n" + "\n".join(form.format("0.1.0") for form in forms) + "\n")
    (root / version.CHANGELOG).write_text(LINES)
    (root / ".gitignore").write_text("dist/\n.venv/\n.container/\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for setting in ("user.name=A Person", "user.email=a@person.example", "init.defaultBranch=main"):
        subprocess.run(["git", "config", "--global", *setting.split("=")], check=True)
    git(root, "init", "--quiet")
    commit(root, "All")
    git(root, "tag", "v0.1.0")
    monkeypatch.setattr(release, "ROOT", root)
    monkeypatch.setattr(release, "build", fake_build)
    monkeypatch.setattr(release, "build_tools", lambda folder: folder)
    monkeypatch.setattr(release, "choose_builder", lambda image, folder: "no Docker")
    return root


def state(root: Path) -> tuple[str, ...]:
    """Return everything that a release could change in *root*."""
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if ".git/" not in str(path))
    return (git(root, "rev-parse", "HEAD"), git(root, "tag"), git(root, "status", "--porcelain"), *files)


def run(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr("sys.argv", ["release", *map(str, words)])
    release.main()


def error_line(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> str:
    """Run a release that must fail with one line; return the line."""
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *words)
    line = str(ended.value.code)
    assert line.startswith("release: ")
    assert "\n" not in line
    return line


def test_a_release_creates_a_commit_a_tag_and_checksums(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "0.2.0")
    assert (
        git(root, "log", "-1", "--format=%s by %an <%ae>") == "Version 0.2.0 by A Person <a@person.example>"
    )
    assert git(root, "rev-parse", "v0.2.0^{commit}") == git(root, "rev-parse", "main")
    assert git(root, "cat-file", "-t", "v0.2.0") == "tag"
    assert git(root, "status", "--porcelain") == ""
    assert version.current_version(root) == "0.2.0"
    assert "0.1.0" not in "".join((root / name).read_text() for name in version.PLACES)
    done = root / "dist" / "0.2.0"
    assert [path.name for path in (root / "dist").iterdir()] == ["0.2.0"]
    sums = dict(reversed(line.split("  ")) for line in (done / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == NAMES == {path.name for path in done.iterdir()} - {"SHA256SUMS"}
    assert all(hashlib.sha256((done / name).read_bytes()).hexdigest() == sums[name] for name in sums)
    assert '"version": "0.2.0"' in (done / "sbom-cpu.json").read_text()
    output = capsys.readouterr().out
    assert "0.1.0 -> 0.2.0; `make test` has NOT passed here on this commit" in output
    assert "no image: no Docker" in output
    assert output.endswith("to publish: git push origin main v0.2.0\n")
    section = r"## \[Unreleased\]\n\n## \[0\.2\.0\] - \d{4}-\d\d-\d\d\n\n### Added\n\n- A thing\.\n"
    assert re.search(section, (root / version.CHANGELOG).read_text())
    assert "CHANGELOG.md: no entries under [Unreleased]" in error_line(monkeypatch, "0.3.0")


def test_the_image_is_built_from_the_commit_and_checksums_are_signed_with_a_key(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public = make_key(tmp_path / "key")
    (root / ".venv").mkdir()
    monkeypatch.setattr(release, "choose_builder", lambda image, folder: FakeBuilder())
    run(monkeypatch, "0.2.0", "--key", tmp_path / "key")
    sums = root / "dist" / "0.2.0" / "SHA256SUMS"
    signature = sums.with_name("SHA256SUMS.minisig").read_text()
    check_message(sums.read_bytes(), signature, read_public(public))
    assert "trusted comment: sopdeploy 0.2.0" in signature
    image = sums.with_name("sopdeploy-0.2.0-image-cpu.tar")
    assert "Dockerfile" in image.read_text().split()
    assert ".venv" not in image.read_text().split()
    assert image.name in sums.read_text()
    assert f"{image.name}, on a base" in capsys.readouterr().out


def test_a_dry_run_changes_nothing_and_reports_passed_tests_of_this_commit_only(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / ".venv").mkdir()
    (root / repository.TESTED).write_text(git(root, "rev-parse", "HEAD") + "\n")
    before = state(root)
    run(monkeypatch, "0.2.0", "--dry-run")
    assert state(root) == before
    words = ("sopdeploy/__init__.py", "CHANGELOG.md", "wheel", "dist/0.2.0", "not signed", "tag v0.2.0")
    output = capsys.readouterr().out
    assert [word for word in (*words, "`make test` passed here on this commit") if word not in output] == []
    (root / "new").write_text("x")
    commit(root, "New")
    run(monkeypatch, "0.2.0", "--dry-run")
    assert "has NOT passed" in capsys.readouterr().out


def write(name: str, text: str, *, committed: bool) -> Callable[[Path], None]:
    """Return a function that writes a file into a repository, and commits it if *committed*."""

    def change(root: Path) -> None:
        (root / name).write_text(text)
        if committed:
            commit(root, "Change")

    return change


EMPTY = LINES.replace("- A thing.\n", "")
INVALID: dict[str, tuple[Callable[[Path], object], str, str]] = {  # a change, the version, the message
    "a changed file": (
        write("compose.yaml", "x", committed=False), "0.2.0", "uncommitted changes: compose.yaml",
    ),
    "a new file": (write("new", "x", committed=False), "0.2.0", "uncommitted changes: new"),
    "another branch": (
        lambda root: git(root, "switch", "--quiet", "--create", "feature"),
        "0.2.0", "the checkout is on feature; releases need main",
    ),
    "no entries": (
        write(version.CHANGELOG, EMPTY, committed=True),
        "0.2.0", "CHANGELOG.md: no entries under [Unreleased]",
    ),
    "no heading": (
        write(version.CHANGELOG, "# Changelog\n", committed=True),
        "0.2.0", "CHANGELOG.md: no line `## [Unreleased]`",
    ),
    "a file without the version": (
        write("compose.yaml", "image: sopdeploy:latest\n", committed=True),
        "0.2.0", "compose.yaml: does not contain image: sopdeploy:0.1.0",
    ),
    "an existing folder": (
        lambda root: (root / "dist" / "0.2.0").mkdir(parents=True),
        "0.2.0", "dist/0.2.0 exists without a tag",
    ),
    "an existing tag": (lambda root: None, "0.1.0", "the tag v0.1.0 exists"),
    "an older version": (lambda root: None, "0.0.9", "0.0.9 is not newer than 0.1.0"),
    "two numbers": (lambda root: None, "0.2", "0.2: a version consists of three numbers"),
}  # fmt: skip


@pytest.mark.parametrize("how", INVALID)
@pytest.mark.parametrize("option", [(), ("--dry-run",)], ids=["real", "dry run"])
def test_an_invalid_repository_is_rejected_and_unchanged(
    how: str, option: tuple[str, ...], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, wanted, message = INVALID[how]
    change(root)
    before = state(root)
    assert message in error_line(monkeypatch, wanted, *option)
    assert [name for name in state(root) if name != "dist"] == [name for name in before if name != "dist"]


def test_a_missing_key_is_rejected(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no key here" in error_line(monkeypatch, "0.2.0", "--key", root / "none")


@pytest.mark.parametrize("step", ["build", "build_image", "write_sums"])
def test_a_failed_step_leaves_no_commit_tag_or_file(
    step: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(root)
    monkeypatch.setattr(release, step, lambda *_: sys.exit("release: it broke"))
    assert error_line(monkeypatch, "0.2.0") == "release: it broke"
    assert list((root / "dist").iterdir()) == []
    assert [name for name in state(root) if name not in {"dist", ".container"}] == list(before)


def test_a_concurrent_commit_is_kept_and_nothing_is_released(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(source: Path, folder: Path, tools: Path) -> None:
        fake_build(source, folder, tools)
        (root / "new").write_text("x")
        commit(root, "Meanwhile")

    monkeypatch.setattr(release, "build", meanwhile)
    assert "git merge failed" in error_line(monkeypatch, "0.2.0")
    assert git(root, "log", "-1", "--format=%s") == "Meanwhile"
    assert git(root, "tag") == "v0.1.0"
    assert list((root / "dist").iterdir()) == []


def test_the_first_release_may_use_the_current_version(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(root, "tag", "--delete", "v0.1.0")
    run(monkeypatch, "0.1.0")
    assert git(root, "tag") == "v0.1.0"


def test_the_version_is_equal_in_all_known_places() -> None:
    found = version.current_version(ROOT)
    assert set(version.with_version(ROOT, found)) == set(version.PLACES)
    command = ["git", "grep", "--name-only", "--fixed-strings", f"sopdeploy:{found}"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert {name for name in listed if not name.startswith("tests/")} <= set(version.PLACES)


def test_the_real_changelog_can_be_released() -> None:
    text = (ROOT / version.CHANGELOG).read_text(encoding="utf-8")
    text = text.replace("## [Unreleased]\n", "## [Unreleased]\n\n- One more.\n")
    later = version.with_release(text, "9.9.9", "2030-01-01")
    assert later.count("## [9.9.9] - 2030-01-01\n") == 1
    assert len(later.splitlines()) == len(text.splitlines()) + 2


def test_a_missing_image_builder_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = choose_builder("x:1", tmp_path)
    assert isinstance(reason, str)
    assert "buildah and debootstrap are not installed" in reason
    assert "start Docker" in reason
