"""Bundles on the Hugging Face Hub: one commit holds the archive, its signature and a model card.

`hf://OWNER/NAME[@REVISION]` is a model repository. The file names never change, so its history lists the
bundles in the order of their upload. Endpoint and token are those of huggingface_hub (`HF_ENDPOINT`,
`HF_TOKEN`).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.signing import MAX_FILE_BYTES
from sopdeploy.bundle.storage import check_size, remote_errors
from sopdeploy.environment import import_optional
from sopdeploy.errors import BundleError, ConfigError

HUB = "hf://"
ARCHIVE, SIGNATURE, CARD = "bundle.tar", "bundle.tar.sig", "README.md"
URL = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def push_to_hub(
    bundle: Bundle, archive: Path, signature: Path | None, url: str, license_id: str | None
) -> str:
    """Commit *archive*, *signature* and the card of *bundle* to *url*; return `hf://OWNER/NAME@COMMIT`.

    A repository that does not exist is created. An older signature is removed if there is no new one. Raises
    `BundleError` for errors of the Hub and `ConfigError` if the client is not installed.
    """
    repository, revision = _parse(url)
    with _client(url) as hub:
        api = hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        existing = {file.rfilename for file in api.model_info(repository).siblings or ()}
        card = model_card(bundle, repository, license_id).encode()
        operations = [
            hub.CommitOperationAdd(ARCHIVE, str(archive)),
            hub.CommitOperationAdd(CARD, card),
        ]
        if signature is not None:
            operations.append(hub.CommitOperationAdd(SIGNATURE, signature.read_bytes()))
        elif SIGNATURE in existing:
            operations.append(hub.CommitOperationDelete(SIGNATURE))
        message = f"Upload bundle {bundle.name}"
        commit = api.create_commit(repository, operations, commit_message=message, revision=revision)
    return f"{HUB}{repository}@{commit.oid}"


def pull_from_hub(source: str, archive: Path, signature: Path, limit: int) -> None:
    """Download the archive of one commit of *source*, and its signature if there is one.

    Raises `BundleError` for errors of the Hub, a repository without a bundle and files larger than *limit*
    bytes.
    """
    repository, revision = _parse(source)
    with _client(source) as hub:
        api = hub.HfApi()
        commit = api.model_info(repository, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size for file in commit.siblings or ()}
        if ARCHIVE not in sizes:
            raise BundleError(
                f"{source}: holds no bundle that `sopdeploy push` wrote; check the name and the revision"
            )
        for name, file, most in ((ARCHIVE, archive, limit), (SIGNATURE, signature, MAX_FILE_BYTES)):
            if name in sizes:
                check_size(sizes[name], source, most)
                folder = file.parent / "hub"
                loaded = api.hf_hub_download(repository, name, revision=commit.sha, local_dir=folder)
                Path(loaded).replace(file)


def model_card(bundle: Bundle, repository: str, license_id: str | None) -> str:
    """Build the card: metadata for the Hub's search, the bundle's model card, and how to use the bundle."""
    manifest = bundle.manifest
    multi_label = manifest.decision is not None and manifest.decision.activation == "sigmoid"
    metadata: dict[str, Any] = {
        **({"license": license_id} if license_id else {}),
        "library_name": "sopdeploy",
        "pipeline_tag": "image-classification",
        "tags": ["onnx", "sopdeploy", manifest.precision, *(["multi-label"] if multi_label else [])],
        "labels": list(bundle.labels),
    }
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    own = bundle.path / CARD
    text = own.read_text("utf-8", "replace") if CARD in manifest.files else f"# {manifest.model}\n"
    use = f"    sopdeploy pull {HUB}{repository} bundles\n    sopdeploy serve bundles/{manifest.name}\n"
    return f"---\n{head}---\n\n{text.rstrip()}\n\n## Use\n\n{use}"


def _parse(url: str) -> tuple[str, str | None]:
    match = URL.fullmatch(url)
    if match is None:
        raise ConfigError(f"{url}: not a repository of the Hub; write {HUB}OWNER/NAME[@REVISION]")
    return match[1], match[2]


@contextmanager
def _client(url: str) -> Iterator[Any]:
    """Yield the module huggingface_hub; convert its errors to `BundleError`."""
    hub = import_optional("huggingface_hub", "huggingface_hub", "sopdeploy[hub]", ConfigError, url)
    with remote_errors(url):
        yield hub
