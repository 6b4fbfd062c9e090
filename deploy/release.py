"""`make release VERSION=1.2.3`: create a commit, a tag, and dist/1.2.3 with all published files.

The commit is made in a clone below dist/.part, and all files are built from it. Only when every step has
succeeded, the folder is renamed and the commit and the tag are fetched. Nothing is pushed.
"""

import argparse
import datetime
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import repository
import sbom
from builders import choose_builder
from distributions import build, build_tools
from version import CHANGELOG, current_version, parse_version, with_release, with_version

from sopdeploy.bundle.signing import SecretKey, read_secret, require_cryptography, sign_message
from sopdeploy.errors import SopdeployError

ROOT = Path(__file__).parents[1]
SUMS = "SHA256SUMS"


def print_line(line: str) -> None:
    """Print *line* and flush."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def check(root: Path, version: str) -> None:
    """Exit with one line unless *root* can be released as *version*; raises `ValueError`."""
    repository.check_state(root)
    released, current = repository.released_versions(root), current_version(root)
    if version in released:
        sys.exit(f"release: the tag v{version} exists; a version can be released once")
    newest = max(released, key=parse_version, default="")
    if newest and parse_version(version) < parse_version(newest):
        sys.exit(f"release: {version} is not newer than {newest}, the newest tag")
    if parse_version(version) < parse_version(current):
        sys.exit(f"release: {version} is not newer than {current}, the version of the code")
    if (root / "dist" / version).exists():
        sys.exit(f"release: dist/{version} exists without a tag; inspect and remove it")
    changed_texts(root, version)


def changed_texts(root: Path, version: str) -> dict[str, str]:
    """Build the files that the commit changes, by name; raises `ValueError`."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    text = (root / CHANGELOG).read_text(encoding="utf-8")
    return with_version(root, version) | {CHANGELOG: with_release(text, version, today)}


def build_image(source: Path, version: str, folder: Path, work: Path) -> str:
    """Build the image of *source* and save it in *folder*, if a builder is available; describe the result."""
    work.mkdir(exist_ok=True)
    builder = choose_builder(f"sopdeploy:{version}", work)
    if isinstance(builder, str):
        return f"no image: {builder}"
    builder.build(source, "cpu")
    name = f"sopdeploy-{version}-image-cpu.tar"
    builder.save(folder / name)
    return f"{name}, on {builder.base}"


def write_sums(folder: Path, key: SecretKey | None, version: str) -> None:
    """Write the sha256 of all files in *folder* to `SUMS`, and its signature if *key* is given."""
    lines = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    sums = "".join(lines)
    (folder / SUMS).write_text(sums, encoding="utf-8")
    if key is not None:
        signature = sign_message(sums.encode(), key, f"sopdeploy {version}")
        (folder / f"{SUMS}.minisig").write_text(signature, encoding="utf-8")


def make_release(root: Path, version: str, key: SecretKey | None) -> None:
    """Build *version* in dist/.part, rename the folder, and fetch commit and tag; undo all on failure."""
    identity = repository.committer(root)
    part, done = root / "dist" / ".part", root / "dist" / version
    shutil.rmtree(part, ignore_errors=True)
    source, files = part / "source", part / "files"
    files.mkdir(parents=True)
    try:
        repository.clone(root, source)
        for name, text in changed_texts(source, version).items():
            (source / name).write_text(text, encoding="utf-8")
        tag = repository.commit_and_tag(source, version, identity)
        with tempfile.TemporaryDirectory(prefix="sopdeploy-tools-") as tools:
            build(source, files, build_tools(Path(tools)))
        sbom.write_all(files, version)
        print_line(build_image(source, version, files, root / ".container"))
        write_sums(files, key, version)
        files.rename(done)
        try:
            repository.fetch_release(root, source, tag)
        except BaseException:
            shutil.rmtree(done)
            raise
    finally:
        shutil.rmtree(part)
    for path in sorted(done.iterdir()):
        print_line(f"{path.relative_to(root)}, {path.stat().st_size:,} bytes")
    print_line(f"committed and tagged {tag}; to publish: git push origin {repository.BRANCH} {tag}")


def print_plan(root: Path, version: str, *, signed: bool) -> None:
    """Print the steps of a release."""
    builder = choose_builder(f"sopdeploy:{version}", root / ".container")
    image = builder if isinstance(builder, str) else f"on {builder.base}"
    print_line(f"would change    {', '.join(changed_texts(root, version))}")
    print_line(f"would build     sdist, wheel, {', '.join(f'sbom-{lock}.json' for lock in sbom.LOCKS)}")
    print_line(f"image           {image}")
    print_line(f"would write     dist/{version}, with {SUMS}{', signed' if signed else ', not signed'}")
    print_line(f"would commit    Version {version}, tag v{version}; nothing is pushed")


def main() -> None:
    """Check the checkout, then print the plan or make the release."""
    parser = argparse.ArgumentParser(prog="release", description="Make a release; see docs/releasing.md.")
    parser.add_argument("version", help="three numbers, such as 1.2.3")
    parser.add_argument("--dry-run", action="store_true", help="check and print the steps without changes")
    parser.add_argument("--key", type=Path, help=f"sign {SUMS} with this secret key of `sopdeploy sign`")
    arguments = parser.parse_args()
    version: str = arguments.version
    try:
        check(ROOT, version)
        key = None
        if arguments.key is not None:
            require_cryptography()
            key = read_secret(arguments.key)
        print_line(f"{current_version(ROOT)} -> {version}; {repository.tests_state(ROOT)}")
        if arguments.dry_run:
            print_plan(ROOT, version, signed=key is not None)
        else:
            make_release(ROOT, version, key)
    except (ValueError, SopdeployError) as problem:
        sys.exit(f"release: {problem}")


if __name__ == "__main__":
    main()
