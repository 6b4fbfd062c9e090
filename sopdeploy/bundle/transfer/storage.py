"""Where archives are kept: a folder, an object store that fsspec knows, or an OCI registry.

A place takes a file under a name and gives a file of at most so many bytes. What a store gives is nobody's
word: the archive proves itself by hashes, and by a signature where one is asked for.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from sopdeploy.bundle.folder import READ_BYTES, digest
from sopdeploy.environment import import_optional
from sopdeploy.errors import BundleError, ConfigError
from sopdeploy.files import atomic_write

OCI = "oci://"


def put(file: Path, place: str, name: str) -> str:
    """Copy *file* to *place*, a folder or a URL of one, under *name*; return where it is now.

    In a folder, and in every object store, the name is there only once the content is whole.
    """
    if "://" in place:
        target = f"{place.rstrip('/')}/{name}"
        with stored(target) as (store, path):
            store.put_file(str(file), path)
        return target
    folder = Path(place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / name) as partial:
            shutil.copyfile(file, partial)
    except OSError as problem:
        raise BundleError(f"{folder / name}: cannot be written ({problem.strerror})") from problem
    return str(folder / name)


def get(source: str, file: Path, limit: int) -> None:
    """Write what lies at *source*, a path or a URL, to *file*; raises `BundleError` beyond *limit* bytes."""
    if "://" in source:
        with stored(source) as (store, path), store.open(path, "rb") as remote:
            copy_limited(remote, file, source, limit)
        return
    if not Path(source).is_file():
        raise BundleError(f"{source}: no archive here; say the path of the .tar that `push` wrote")
    if not os.access(source, os.R_OK):
        raise BundleError(f"{source}: cannot be read; ask for the permission")
    with Path(source).open("rb") as near:  # what goes wrong now is of where *file* lies
        copy_limited(near, file, source, limit)


def copy_limited(source: IO[bytes] | BinaryIO, file: Path, name: str, limit: int) -> None:
    """Write *source* to *file*; raises `BundleError` as soon as it is longer than *limit* bytes."""
    left = limit
    with file.open("wb") as target:
        while block := source.read(READ_BYTES):
            left -= len(block)
            if left < 0:
                raise BundleError(f"{name}: larger than {limit} bytes; `--max-bytes` allows more")
            target.write(block)


@contextmanager
def stored(url: str) -> Iterator[tuple[Any, str]]:
    """Give the store of *url*, by fsspec, and the path in it.

    Raises `BundleError` for whatever the store says, `ConfigError` without fsspec.
    """
    fsspec = import_optional("fsspec", "fsspec", "sopdeploy[s3]", ConfigError, url)
    try:
        yield fsspec.core.url_to_fs(url)
    except (BundleError, ConfigError):
        raise
    except Exception as problem:  # every store has errors of its own, and none of them is ours
        raise BundleError(f"{url}: {type(problem).__name__}: {problem}") from problem


ARCHIVE = "application/vnd.sopdeploy.bundle.v1.tar"
SIGNATURE = "application/vnd.sopdeploy.bundle.v1.minisig"
ANSWER_SECONDS = 10  # asked once first: the client itself would go on asking for two minutes
ARTIFACT = {"org.opencontainers.image.title": "sopdeploy bundle"}


def push_artifact(archive: Path, signature: Path | None, place: str, tag: str) -> str:
    """Push *archive*, and *signature* where there is one, to *place*; return the reference.

    Raises `BundleError` for whatever the registry says, `ConfigError` where the client is not installed.
    """
    target = place.removeprefix(OCI)
    if ":" not in target.rpartition("/")[2]:
        target = f"{target}:{tag}"
    files = [f"{archive}:{ARCHIVE}"] + ([f"{signature}:{SIGNATURE}"] if signature else [])
    client = registry_client(target)
    try:
        client.push(
            target, files=files, manifest_annotations=ARTIFACT, disable_path_validation=True, quiet=True
        )
    except Exception as problem:  # the client passes on errors of several libraries
        raise BundleError(f"{OCI}{target}: {type(problem).__name__}: {problem}") from problem
    return OCI + target


def pull_artifact(reference: str, archive: Path, signature: Path, limit: int) -> None:
    """Write the layers of *reference* to *archive* and, where there is one, *signature*.

    Raises `BundleError` for layers that are missing, too large or not what their digest says.
    """
    target = reference.removeprefix(OCI)
    client = registry_client(target)
    try:
        container = client.get_container(target)
        client.auth.load_configs(container)
        layers = client.get_manifest(container)["layers"]
        found = {layer["mediaType"]: layer["digest"] for layer in layers}
        if ARCHIVE not in found:
            raise BundleError(f"{reference}: holds no bundle that `sopdeploy push` wrote")
        for kind, file in ((ARCHIVE, archive), (SIGNATURE, signature)):
            if kind in found:
                with client.get_blob(container, found[kind], stream=True) as answer:
                    answer.raise_for_status()
                    copy_limited(answer.raw, file, reference, limit)
                if f"sha256:{digest(file)}" != found[kind]:
                    raise BundleError(f"{reference}: the registry gave other bytes than it promised")
    except BundleError:
        raise
    except Exception as problem:  # as above
        raise BundleError(f"{reference}: {type(problem).__name__}: {problem}") from problem


def registry_client(target: str) -> Any:
    """Return a client for the registry of *target*, which answers.

    Raises `BundleError` where it does not, `ConfigError` where the client is not installed.
    """
    oras = import_optional("oras.client", "oras", "sopdeploy[oci]", ConfigError, f"{OCI}{target}")
    host = target.partition("/")[0]
    client = oras.OrasClient(insecure=host.partition(":")[0] in {"localhost", "127.0.0.1"})
    try:
        client.session.get(f"{client.prefix}://{host}/v2/", timeout=ANSWER_SECONDS)
    except OSError as problem:
        raise BundleError(
            f"{OCI}{target}: no registry answers at {host} ({type(problem).__name__})"
        ) from problem
    return client
