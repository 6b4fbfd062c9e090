"""git, as a release needs it: whether a state is fit for one, and a commit made elsewhere and taken over."""

import os
import re
import subprocess
import sys
from pathlib import Path

BRANCH = "main"
TESTED = ".venv/.tested"  # where `make test` writes the commit that passed


def git(root: Path, *words: str | Path, **environment: str) -> str:
    """Run git in *root* and return what it prints; where it fails, end with its last line."""
    command = ["git", "-C", str(root), *(str(word) for word in words)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if found.returncode:
        said = (found.stderr.strip().splitlines() or ["it said nothing"])[-1]
        sys.exit(f"release: git {words[0]} failed in {root.name}: {said}")
    return found.stdout.rstrip("\n")


def released_versions(root: Path) -> list[str]:
    """Return the versions that have a tag."""
    tags = git(root, "tag", "--list", "v*").splitlines()
    return [tag[1:] for tag in tags if re.fullmatch(r"v\d+\.\d+\.\d+", tag)]


def check_state(root: Path) -> None:
    """End unless *root* is on the branch of releases, with nothing that is not committed."""
    branch = git(root, "rev-parse", "--abbrev-ref", "HEAD")
    if branch != BRANCH:
        sys.exit(f"release: the checkout is on {branch}; releases are made on {BRANCH}: git switch {BRANCH}")
    if changed := git(root, "status", "--porcelain").splitlines():
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        sys.exit(f"release: not everything is committed: {changed[0][3:]}{more}")


def tests_state(root: Path) -> str:
    """Return whether `make test` has passed here on this commit."""
    tested = root / TESTED
    if tested.is_file() and tested.read_text(encoding="utf-8").strip() == git(root, "rev-parse", "HEAD"):
        return "`make test` passed here on this commit"
    return "`make test` has NOT passed here on this commit"


def author(root: Path) -> dict[str, str]:
    """Return the settings that make commits elsewhere the ones of who works in *root*."""
    name, _, rest = git(root, "var", "GIT_COMMITTER_IDENT").partition(" <")
    who = {"NAME": name, "EMAIL": rest.partition(">")[0]}
    return {f"GIT_{role}_{what}": value for role in ("AUTHOR", "COMMITTER") for what, value in who.items()}


def copy_of(root: Path, folder: Path) -> None:
    """Make at *folder* a clone of *root*, in which nothing is but what is committed."""
    git(root, "clone", "--quiet", "--shared", root.resolve(), folder.resolve())


def commit_and_tag(copy: Path, version: str, identity: dict[str, str]) -> str:
    """Commit all changes in *copy* and tag them; return the name of the tag."""
    tag = f"v{version}"
    git(copy, "commit", "--quiet", "--all", "--message", f"Version {version}", **identity)
    git(copy, "tag", "--annotate", tag, "--message", f"sopdeploy {version}", **identity)
    return tag


def take_over(root: Path, copy: Path, tag: str) -> None:
    """Let *root* have the commit and the tag that were made in *copy*, or neither."""
    git(root, "fetch", "--quiet", "--no-tags", copy.resolve(), f"refs/tags/{tag}:refs/tags/{tag}")
    try:
        git(root, "merge", "--quiet", "--ff-only", tag)
    except SystemExit:
        git(root, "tag", "--delete", tag)
        raise
