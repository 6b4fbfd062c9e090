"""Push to and pull from a stand-in for the Hugging Face Hub."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import yaml

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.hub import model_card
from sopdeploy.bundle.signing import make_key, sign, signature_path
from sopdeploy.bundle.transfer import pull, push
from sopdeploy.errors import BundleError
from tests.forged import LABELS, write_hollow
from tests.sopdeploy.bundle.test_transfer import cli, cli_error, contents

URL = "hf://owner/flowers"


class Hub:
    """The commits of each repository, oldest first, with their files."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}

    def create_repo(self, repository: str, **_: Any) -> None:
        self.repositories.setdefault(repository, {})

    def create_commit(self, repository: str, operations: list[Any], **_: Any) -> Any:
        commits = self.repositories[repository]
        files = dict(next(reversed(commits.values()), {}))
        for operation in operations:
            if hasattr(operation, "path_or_fileobj"):
                with operation.as_file() as file:
                    files[operation.path_in_repo] = file.read()
            else:
                del files[operation.path_in_repo]
        commits[str(len(commits))] = files
        return SimpleNamespace(oid=str(len(commits) - 1))

    def model_info(self, repository: str, *, revision: str | None = None, **_: Any) -> Any:
        commits = self.repositories[repository]
        commit = revision or next(reversed(commits), "")
        files = commits[commit] if commit else {}
        siblings = [SimpleNamespace(rfilename=name, size=len(body)) for name, body in files.items()]
        return SimpleNamespace(sha=commit, siblings=siblings)

    def hf_hub_download(self, repository: str, name: str, *, revision: str, local_dir: Path) -> str:
        local_dir.mkdir(exist_ok=True)
        (local_dir / name).write_bytes(self.repositories[repository][revision][name])
        return str(local_dir / name)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Replace the client by a stand-in with the signatures of its methods."""
    client, hub = pytest.importorskip("huggingface_hub"), Hub()
    api = create_autospec(client.HfApi, instance=True)
    for name in ("create_repo", "create_commit", "model_info", "hf_hub_download"):
        getattr(api, name).side_effect = getattr(hub, name)
    monkeypatch.setattr(client, "HfApi", lambda: api)
    return hub


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_hollow(tmp_path / "bundles")


def test_a_signed_bundle_is_pushed_to_and_pulled_from_the_hub(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    key = tmp_path / "release.key"
    make_key(key)
    sign(bundle, key)
    pushed = push(bundle, URL, license_id="mit")
    repository = hub.repositories["owner/flowers"]
    assert pushed.signed
    assert [pushed.url] == [f"{URL}@{commit}" for commit in repository]
    [files] = repository.values()
    assert set(files) == {"bundle.tar", "bundle.tar.sig", "README.md"}
    folder = push(bundle, str(tmp_path / "folder"))
    assert (files["bundle.tar"], pushed.sha256) == (Path(folder.url).read_bytes(), folder.sha256)
    public = key.with_name("release.key.pub")
    for number, source in enumerate((URL, pushed.url)):
        pulled = pull(source, tmp_path / str(number), sha256=pushed.sha256, require_signature=public)
        assert pulled.verified
        assert contents(pulled.path) == contents(bundle)
        assert signature_path(pulled.path).read_bytes() == signature_path(bundle).read_bytes()


def test_the_next_commit_replaces_the_bundle_and_removes_its_signature(
    hub: Hub, bundle: Path, tmp_path: Path
) -> None:
    make_key(tmp_path / "release.key")
    sign(bundle, tmp_path / "release.key")
    first = push(bundle, URL)
    second = push(write_hollow(tmp_path / "bundles", model="other"), URL)
    assert set(hub.repositories["owner/flowers"][second.url.rpartition("@")[2]]) == {
        "bundle.tar",
        "README.md",
    }
    assert pull(URL, tmp_path / "a").path.name.startswith("other-")
    assert pull(first.url, tmp_path / "a").path.name == bundle.name
    with pytest.raises(BundleError, match="no signature"):
        pull(URL, tmp_path / "b", require_signature=tmp_path / "release.key.pub")
    with pytest.raises(BundleError, match="larger than 100 bytes"):
        pull(URL, tmp_path / "b", max_bytes=100)
    assert list((tmp_path / "b").iterdir()) == []


def test_errors_of_the_hub_are_one_line(hub: Hub, bundle: Path, tmp_path: Path) -> None:
    hub.repositories["owner/empty"] = {"0": {}}
    for source, message in (
        ("hf://owner/none", "hf://owner/none: KeyError: 'owner/none'; check the address"),
        ("hf://owner/empty", "holds no bundle"),
        ("hf://owner", "not a repository of the Hub"),
        ("hf://../x/y", "not a repository of the Hub"),
    ):
        assert message in cli_error("pull", source, tmp_path / "here")
    assert "only hf://" in cli_error("push", bundle, tmp_path / "folder", "--license", "mit")
    result = json.loads(cli("push", bundle, URL, "--license", "apache-2.0", "--json").stdout)
    assert result["url"].startswith(f"{URL}@")


def test_the_card_has_labels_task_license_and_the_text_of_the_bundle(tmp_path: Path) -> None:
    bundle = open_bundle(write_hollow(tmp_path))
    _, head, body = model_card(bundle, "owner/flowers", "apache-2.0").split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["labels"] == LABELS
    assert (metadata["license"], metadata["pipeline_tag"]) == ("apache-2.0", "image-classification")
    assert "# tiny" in body
    assert "sopdeploy pull hf://owner/flowers bundles" in body
    assert "license" not in model_card(bundle, "owner/flowers", None)
