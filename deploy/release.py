"""`make release VERSION=1.2.3`: a commit, a tag, and dist/1.2.3 with everything that is given away.

The commit is made in a clone below dist/.part and everything is built from it there; only when all of it is
done is the folder renamed, and commit and tag taken over. Nothing is pushed.
"""

import argparse
import datetime
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import changelog
import repository
import sbom
from builders import choose_builder
from distributions import build, build_tools
from version import current, parts, raised

from sopdeploy.bundle.signing import SecretKey, read_secret, require_cryptography, sign_message
from sopdeploy.errors import SopdeployError

ROOT = Path(__file__).parents[1]
SUMS = "SHA256SUMS"


def say(line: str) -> None:
    """Print *line* at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def check(root: Path, version: str) -> None:
    """End with one line unless *root* can become *version*."""
    repository.check_state(root)
    known = repository.released_versions(root)
    if version in known:
        sys.exit(f"release: the tag v{version} exists; a version is released once")
    newest = max(known, key=parts, default="")
    if newest and parts(version) < parts(newest):
        sys.exit(f"release: {version} is not newer than {newest}, the newest with a tag")
    if parts(version) < parts(current(root)):
        sys.exit(f"release: {version} is not newer than {current(root)}, which the code has")
    if (root / "dist" / version).exists():
        sys.exit(f"release: dist/{version} exists without a tag; look at it and remove it")
    changelog.unreleased((root / changelog.NAME).read_text(encoding="utf-8"))


def new_texts(root: Path, version: str) -> dict[str, str]:
    """Return the files that the commit changes, by name; raises `ValueError`."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    text = (root / changelog.NAME).read_text(encoding="utf-8")
    return raised(root, version) | {changelog.NAME: changelog.released(text, version, today)}


def build_image(source: Path, version: str, folder: Path, work: Path) -> str:
    """Build the image of *source* and write it into *folder* where that can be done; return what was done."""
    work.mkdir(exist_ok=True)
    builder = choose_builder(f"sopdeploy:{version}", work)
    if isinstance(builder, str):
        return f"no image: {builder}"
    builder.build(source)
    name = f"sopdeploy-{version}-image-cpu.tar"
    builder.save(folder / name)
    return f"{name}, on {builder.base}"


def write_sums(folder: Path, key: SecretKey | None, version: str) -> None:
    """Write the sha256 of every file in *folder* beside them, signed with *key* where there is one."""
    lines = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    sums = "".join(lines)
    (folder / SUMS).write_text(sums, encoding="utf-8")
    if key is not None:
        signature = sign_message(sums.encode(), key, f"sopdeploy {version}")
        (folder / f"{SUMS}.minisig").write_text(signature, encoding="utf-8")


def make(root: Path, version: str, key: SecretKey | None) -> None:
    """Build all of *version* in dist/.part, then give it its name and take over commit and tag."""
    identity = repository.author(root)
    part, done = root / "dist" / ".part", root / "dist" / version
    shutil.rmtree(part, ignore_errors=True)
    source, files = part / "source", part / "files"
    files.mkdir(parents=True)
    try:
        repository.copy_of(root, source)
        for name, text in new_texts(source, version).items():
            (source / name).write_text(text, encoding="utf-8")
        tag = repository.commit_and_tag(source, version, identity)
        with tempfile.TemporaryDirectory(prefix="sopdeploy-tools-") as tools:
            build(source, files, build_tools(Path(tools)))
        sbom.write_all(files, version)
        say(build_image(source, version, files, root / ".container"))
        write_sums(files, key, version)
        files.rename(done)
        try:
            repository.take_over(root, source, tag)
        except BaseException:
            shutil.rmtree(done)
            raise
    finally:
        shutil.rmtree(part)
    for path in sorted(done.iterdir()):
        say(f"{path.relative_to(root)}, {path.stat().st_size:,} bytes")
    say(f"committed and tagged {tag}; to publish: git push origin {repository.BRANCH} {tag}")


def plan(root: Path, version: str, *, signed: bool) -> None:
    """Print what a release would do."""
    builder = choose_builder(f"sopdeploy:{version}", root / ".container")
    image = builder if isinstance(builder, str) else f"on {builder.base}"
    say(f"would change    {', '.join(new_texts(root, version))}")
    say(f"would build     sdist, wheel, {', '.join(f'sbom-{lock}.json' for lock in sbom.LOCKS)}")
    say(f"image           {image}")
    say(f"would write     dist/{version}, with {SUMS}{', signed' if signed else ', not signed'}")
    say(f"would commit    Version {version}, tag v{version}; nothing is pushed")


def main() -> None:
    """Check, then plan or make."""
    parser = argparse.ArgumentParser(prog="release", description="Make a release; see docs/releasing.md.")
    parser.add_argument("version", help="three numbers, as in 1.2.3")
    parser.add_argument(
        "--dry-run", action="store_true", help="check, say what would be done, and do nothing"
    )
    parser.add_argument("--key", type=Path, help=f"sign {SUMS} with this secret key of `sopdeploy sign`")
    given = parser.parse_args()
    try:
        check(ROOT, given.version)
        key = None
        if given.key is not None:
            require_cryptography()
            key = read_secret(given.key)
        say(f"{current(ROOT)} -> {given.version}; {repository.tests_state(ROOT)}")
        if given.dry_run:
            plan(ROOT, given.version, signed=key is not None)
        else:
            make(ROOT, given.version, key)
    except (ValueError, SopdeployError) as problem:
        sys.exit(f"release: {problem}")


if __name__ == "__main__":
    main()
