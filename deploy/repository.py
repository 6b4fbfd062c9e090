"""Git operations of a release: check the checkout, commit in a clone, fetch the commit and the tag."""

import os
import re
import subprocess
import sys
from pathlib import Path

BRANCH = "main"
TESTED = ".venv/.tested"  # `make test` writes the commit here when it passes


def git(root: Path, *words: str | Path, **environment: str) -> str:
    """Run git in *root* and return its output; exit with its last line if it fails."""
    command = ["git", "-C", str(root), *(str(word) for word in words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["no output"])[-1]
        sys.exit(f"release: git {words[0]} failed in {root.name}: {message}")
    return done.stdout.rstrip("\n")


def released_versions(root: Path) -> list[str]:
    """List the versions that have a tag."""
    tags = git(root, "tag", "--list", "v*").splitlines()
    return [tag[1:] for tag in tags if re.fullmatch(r"v\d+\.\d+\.\d+", tag)]


def check_state(root: Path) -> None:
    """Exit unless *root* is on the release branch without uncommitted changes."""
    branch = git(root, "rev-parse", "--abbrev-ref", "HEAD")
    if branch != BRANCH:
        sys.exit(f"release: the checkout is on {branch}; releases need {BRANCH}: git switch {BRANCH}")
    if changed := git(root, "status", "--porcelain").splitlines():
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        sys.exit(f"release: uncommitted changes: {changed[0][3:]}{more}")


def tests_state(root: Path) -> str:
    """Describe whether `make test` passed in this checkout on this commit."""
    tested = root / TESTED
    if tested.is_file() and tested.read_text(encoding="utf-8").strip() == git(root, "rev-parse", "HEAD"):
        return "`make test` passed here on this commit"
    return "`make test` has NOT passed here on this commit"


def committer(root: Path) -> dict[str, str]:
    """Build the environment variables for commits in a clone with the identity of *root*."""
    name, _, rest = git(root, "var", "GIT_COMMITTER_IDENT").partition(" <")
    identity = {"NAME": name, "EMAIL": rest.partition(">")[0]}
    return {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in identity.items()}


def clone(root: Path, folder: Path) -> None:
    """Clone *root* into *folder*; the clone contains committed files only."""
    git(root, "clone", "--quiet", "--shared", root.resolve(), folder.resolve())


def commit_and_tag(copy: Path, version: str, identity: dict[str, str]) -> str:
    """Commit all changes in the clone *copy* and tag the commit; return the tag."""
    tag = f"v{version}"
    git(copy, "commit", "--quiet", "--all", "--message", f"Version {version}", **identity)
    git(copy, "tag", "--annotate", tag, "--message", f"sopdeploy {version}", **identity)
    return tag


def fetch_release(root: Path, copy: Path, tag: str) -> None:
    """Fetch the tag from the clone *copy* and fast-forward *root* to it; remove the tag on failure."""
    git(root, "fetch", "--quiet", "--no-tags", copy.resolve(), f"refs/tags/{tag}:refs/tags/{tag}")
    try:
        git(root, "merge", "--quiet", "--ff-only", tag)
    except SystemExit:
        git(root, "tag", "--delete", tag)
        raise
