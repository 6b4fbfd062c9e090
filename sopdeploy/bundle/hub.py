"""Bundles on the Hugging Face Hub: one commit holds the archive, its signature and a model card.

`hf://OWNER/NAME[@REVISION]` is a model repository. The file names never change, so its history lists the
bundles in the order of their upload. Endpoint and token are those of huggingface_hub (`HF_ENDPOINT`,
`HF_TOKEN`).
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.signing import MAX_FILE_BYTES
from sopdeploy.bundle.storage import write_blocks
from sopdeploy.environment import import_optional
from sopdeploy.errors import BundleError, ConfigError

HUB = "hf://"
ARCHIVE, SIGNATURE, CARD = "bundle.tar", "bundle.tar.minisig", "README.md"
URL = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
NOT_FOUND = "no such repository or revision, or no access; log in with `hf auth login`"


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
        found = api.model_info(repository, revision=revision)
        names = {file.rfilename for file in found.siblings or ()}
        if ARCHIVE not in names:
            raise BundleError(
                f"{source}: holds no bundle that `sopdeploy push` wrote; check the name and the revision"
            )
        for name, file, most in ((ARCHIVE, archive, limit), (SIGNATURE, signature, MAX_FILE_BYTES)):
            if name in names:
                url = hub.hf_hub_url(repository, name, revision=found.sha)
                headers = {**hub.utils.build_hf_headers(), "accept-encoding": "identity"}
                with hub.get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
                    hub.utils.hf_raise_for_status(response)
                    write_blocks(response.iter_bytes(), file, source, most)


def model_card(bundle: Bundle, repository: str, license_id: str | None) -> str:
    """Build the card: metadata for the Hub's search, the bundle's model card, and how to use the bundle."""
    manifest = bundle.manifest
    task = "image-classification"
    metadata: dict[str, Any] = {
        **({"license": license_id} if license_id else {}),
        "library_name": "sopdeploy",
        "pipeline_tag": task,
        "tags": ["onnx", "sopdeploy", manifest.precision, *_kinds(bundle)],
        "labels": list(bundle.labels),
    }
    metrics = _metrics(bundle)
    if metrics:
        result = {
            "task": {"type": task},
            "dataset": {"name": "held-out images", "type": "custom"},
            "metrics": metrics,
        }
        metadata["model-index"] = [{"name": manifest.model, "results": [result]}]
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    own = bundle.path / CARD
    text = own.read_text("utf-8", "replace") if CARD in manifest.files else f"# {manifest.model}\n"
    use = f"    sopdeploy pull {HUB}{repository} bundles\n    sopdeploy serve bundles/{manifest.name}\n"
    return f"---\n{head}---\n\n{text.rstrip()}\n\n## Use\n\n{use}"


def _kinds(bundle: Bundle) -> list[str]:
    decision = bundle.manifest.decision
    return ["multi-label"] if decision is not None and decision.activation == "sigmoid" else []


def _metrics(bundle: Bundle) -> list[dict[str, Any]]:
    """List the metrics that the bundle contains: accuracy, calibration error and AUROC for unknown images."""
    found: dict[str, float | None] = {}
    if "precision.json" in bundle.manifest.files:
        accuracy = json.loads((bundle.path / "precision.json").read_bytes()).get("accuracy") or {}
        found["accuracy"] = accuracy.get("after")
    decision = bundle.manifest.decision
    if decision is not None and decision.calibration is not None:
        found["expected_calibration_error"] = decision.calibration.error_after
    if decision is not None and decision.rejection is not None:
        found["roc_auc_unknown_images"] = decision.rejection.auroc
    return [{"type": name, "value": value} for name, value in found.items() if value is not None]


def _parse(url: str) -> tuple[str, str | None]:
    match = URL.fullmatch(url)
    if match is None:
        raise ConfigError(f"{url}: not a repository of the Hub; write {HUB}OWNER/NAME[@REVISION]")
    return match[1], match[2]


@contextmanager
def _client(url: str) -> Iterator[Any]:
    """Yield the module huggingface_hub; convert its errors to `BundleError`."""
    for module in ("huggingface_hub.utils", "huggingface_hub.errors", "huggingface_hub"):
        hub = import_optional(module, "huggingface_hub", "sopdeploy[hub]", ConfigError, url)
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    try:
        yield hub
    except (BundleError, ConfigError):
        raise
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
        raise BundleError(f"{url}: {NOT_FOUND}") from error
    except Exception as error:  # the client raises types of several libraries
        cause = error.__cause__ or error  # the client wraps errors of uploads
        text = " ".join(str(cause).split())
        raise BundleError(
            f"{url}: {type(cause).__name__}: {text}; check the name, the network and HF_TOKEN"
        ) from error
