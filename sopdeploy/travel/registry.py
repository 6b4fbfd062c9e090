"""Bundles in an OCI registry: one artifact, a layer for the archive and one for its signature.

The reference is `oci://HOST/REPOSITORY[:TAG]`, the tag the bundle's id where none is given. Credentials are
those of `docker login`. A registry on this machine is spoken to without TLS, as Docker does.
"""

from pathlib import Path
from typing import Any

from sopdeploy.bundle import digest
from sopdeploy.errors import BundleError, ConfigError
from sopdeploy.extras import imported
from sopdeploy.travel.places import OCI, copy_limited

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
    oras = imported("oras.client", "oras", "sopdeploy[oci]", ConfigError, f"{OCI}{target}")
    host = target.partition("/")[0]
    client = oras.OrasClient(insecure=host.partition(":")[0] in {"localhost", "127.0.0.1"})
    try:
        client.session.get(f"{client.prefix}://{host}/v2/", timeout=ANSWER_SECONDS)
    except OSError as problem:
        raise BundleError(
            f"{OCI}{target}: no registry answers at {host} ({type(problem).__name__})"
        ) from problem
    return client
