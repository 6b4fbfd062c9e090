"""Storage for archives: folders, object stores supported by fsspec, and OCI registries.

Stores are not trusted. The archive is checked by its hashes, and by a signature if one is required.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from sopdeploy.bundle.signing import MAX_FILE_BYTES
from sopdeploy.environment import import_optional
from sopdeploy.errors import BundleError, ConfigError
from sopdeploy.files import BLOCK_BYTES, atomic_write, sha256, writing

OCI = "oci://"
ARCHIVE_TYPE = "application/vnd.sopdeploy.bundle.v1.tar"
SIGNATURE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
ANNOTATIONS = {"org.opencontainers.image.title": "sopdeploy bundle"}
CONNECT_TIMEOUT = 10  # seconds; the OCI client itself retries for two minutes


def put(file: Path, destination: str, name: str) -> str:
    """Copy *file* to *destination*, a folder or its URL, under *name*; return the new location.

    Readers never see an incomplete file under *name*.
    """
    if "://" in destination:
        target = f"{destination.rstrip('/')}/{name}"
        with _filesystem(target) as (store, path):
            store.put_file(str(file), path)
        return target
    folder = Path(destination)
    with writing(folder / name, BundleError):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / name) as partial:
            shutil.copyfile(file, partial)
    return str(folder / name)


def get(source: str, file: Path, limit: int) -> None:
    """Copy *source*, a path or URL, to *file*; raise `BundleError` if it is larger than *limit* bytes."""
    if "://" in source:
        with _filesystem(source) as (store, path), store.open(path, "rb") as remote:
            _copy(remote, file, source, limit)
        return
    if not Path(source).is_file():
        raise BundleError(f"{source}: is not an archive; give the path of the .tar file that `push` wrote")
    with Path(source).open("rb") as local:
        _copy(local, file, source, limit)


def _copy(source: IO[bytes] | BinaryIO, file: Path, name: str, limit: int) -> None:
    """Copy *source* to *file*; raise `BundleError` naming *name* if it exceeds *limit* bytes."""
    size = 0
    with file.open("wb") as target:
        while block := source.read(BLOCK_BYTES):
            size += len(block)
            if size > limit:
                raise BundleError(f"{name}: larger than {limit} bytes; `--max-bytes` allows more")
            target.write(block)


@contextmanager
def _remote_errors(url: str) -> Iterator[None]:
    """Convert errors of the client of a store to `BundleError`; clients raise types of several libraries."""
    try:
        yield
    except (BundleError, ConfigError):
        raise
    except Exception as error:
        cause = error.__cause__ or error  # clients wrap errors of uploads
        text = " ".join(str(cause).split())
        raise BundleError(
            f"{url}: {type(cause).__name__}: {text}; check the address, the network and the credentials"
        ) from error


@contextmanager
def _filesystem(url: str) -> Iterator[tuple[Any, str]]:
    """Yield the fsspec file system of *url* and the path in it; convert its errors to `BundleError`."""
    fsspec = import_optional("fsspec", "fsspec", "sopdeploy[s3]", ConfigError, url)
    if url.startswith("hf://"):
        import_optional("huggingface_hub", "huggingface_hub", "sopdeploy[hub]", ConfigError, url)
    with _remote_errors(url):
        yield fsspec.core.url_to_fs(url)


def push_artifact(archive: Path, signature: Path | None, url: str, tag: str) -> str:
    """Push *archive* and the optional *signature* to the OCI registry *url*; return the reference.

    *tag* is used if *url* has none. Raises `BundleError` for registry errors and `ConfigError` if the
    client is not installed.
    """
    target = url.removeprefix(OCI)
    if ":" not in target.rpartition("/")[2]:
        target = f"{target}:{tag}"
    files = [f"{archive}:{ARCHIVE_TYPE}"] + ([f"{signature}:{SIGNATURE_TYPE}"] if signature else [])
    client = _registry_client(target)
    with _remote_errors(f"{OCI}{target}"):
        client.push(
            target, files=files, manifest_annotations=ANNOTATIONS, disable_path_validation=True, quiet=True
        )
    return OCI + target


def pull_artifact(reference: str, archive: Path, signature: Path, limit: int) -> None:
    """Download the layers of *reference* to *archive* and, if present, *signature*.

    Raises `BundleError` for layers that are missing, differ from their digest or are too large: an archive
    above *limit* bytes, or a signature above `MAX_FILE_BYTES`.
    """
    target = reference.removeprefix(OCI)
    client = _registry_client(target)
    with _remote_errors(reference):
        container = client.get_container(target)
        client.auth.load_configs(container)
        layers = client.get_manifest(container)["layers"]
        digests = {layer["mediaType"]: layer["digest"] for layer in layers}
        if ARCHIVE_TYPE not in digests:
            raise BundleError(
                f"{reference}: holds no bundle that `sopdeploy push` wrote; check the name and the tag"
            )
        limits = (ARCHIVE_TYPE, archive, limit), (SIGNATURE_TYPE, signature, MAX_FILE_BYTES)
        for kind, file, max_bytes in limits:
            if kind in digests:
                with client.get_blob(container, digests[kind], stream=True) as response:
                    response.raise_for_status()
                    _copy(response.raw, file, reference, max_bytes)
                if f"sha256:{sha256(file)}" != digests[kind]:
                    raise BundleError(
                        f"{reference}: the registry sent other bytes than its digest says"
                        "; push the bundle again"
                    )


def _registry_client(target: str) -> Any:
    """Create a client for the registry of *target* after checking that the registry responds."""
    oras = import_optional("oras.client", "oras", "sopdeploy[oci]", ConfigError, f"{OCI}{target}")
    host = target.partition("/")[0]
    client = oras.OrasClient(insecure=host.partition(":")[0] in {"localhost", "127.0.0.1"})
    try:
        client.session.get(f"{client.prefix}://{host}/v2/", timeout=CONNECT_TIMEOUT)
    except OSError as error:
        raise BundleError(
            f"{OCI}{target}: no registry responds at {host} ({type(error).__name__}); check the address"
        ) from error
    return client
