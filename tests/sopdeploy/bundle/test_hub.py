"""Push to and pull from a stand-in for the Hugging Face Hub."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.hub import model_card
from sopdeploy.bundle.signing import make_key, sign, signature_path
from sopdeploy.bundle.transfer import pull, push
from sopdeploy.decision import Calibration, Decision, Rejection
from sopdeploy.errors import BundleError, ConfigError
from tests.forged import LABELS, write_hollow
from tests.sopdeploy.bundle.hub_server import TOKEN, Hub, running_hub
from tests.sopdeploy.bundle.test_transfer import cli, cli_error, contents

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client
URL = "hf://owner/flowers"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    constants = pytest.importorskip("huggingface_hub.constants")
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


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
    assert set(files) == {"bundle.tar", "bundle.tar.minisig", "README.md"}
    folder = push(bundle, str(tmp_path / "folder"))
    assert (files["bundle.tar"], pushed.sha256) == (Path(folder.url).read_bytes(), folder.sha256)
    public = key.with_name("release.key.pub")
    for number, source in enumerate((URL, pushed.url)):
        pulled = pull(source, tmp_path / str(number), sha256=pushed.sha256, verify_key=public)
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
        pull(URL, tmp_path / "b", verify_key=tmp_path / "release.key.pub")
    with pytest.raises(BundleError, match="larger than 100 bytes"):
        pull(URL, tmp_path / "b", max_bytes=100)
    assert list((tmp_path / "b").iterdir()) == []


def test_errors_of_the_hub_are_one_line(
    hub: Hub, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["owner/empty"] = {"0" * 40: {}}
    for source, message in (
        ("hf://owner/none", "no such repository"),
        ("hf://owner/empty@none", "no such repository or revision"),
        ("hf://owner/empty", "holds no bundle"),
        ("hf://owner", "not a repository of the Hub"),
        ("hf://../x/y", "not a repository of the Hub"),
    ):
        assert message in cli_error("pull", source, tmp_path / "here")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "401" in cli_error("push", bundle, URL)
    assert "only hf://" in cli_error("push", bundle, tmp_path / "folder", "--license", "mit")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    result = json.loads(cli("push", bundle, URL, "--license", "apache-2.0", "--json").stdout)
    assert result["url"].startswith(f"{URL}@")


def test_a_missing_package_has_an_install_hint(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"sopdeploy\[hub\]"):
        push(bundle, URL)


def test_the_card_has_labels_task_license_and_the_figures_of_the_bundle(tmp_path: Path) -> None:
    decision = Decision(
        calibration=Calibration(
            temperature=1.5, error_before=0.1, error_after=0.02, images=100, estimated_on="held-out"
        ),
        rejection=Rejection(score="max_probability", threshold=0.5, auroc=0.9),
    )

    def write_accuracy(folder: Path) -> None:
        (folder / "precision.json").write_text('{"accuracy": {"after": 0.875, "images": 8}}')

    path = write_hollow(tmp_path, write_accuracy, decision=decision)
    card = model_card(open_bundle(path), "owner/flowers", "apache-2.0")
    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["labels"] == LABELS
    assert (metadata["license"], metadata["pipeline_tag"]) == ("apache-2.0", "image-classification")
    metrics = metadata["model-index"][0]["results"][0]["metrics"]
    assert {metric["type"]: metric["value"] for metric in metrics} == {
        "accuracy": 0.875,
        "expected_calibration_error": 0.02,
        "roc_auc_unknown_images": 0.9,
    }
    assert "# tiny" in body
    assert "sopdeploy pull hf://owner/flowers bundles" in body
    plain = model_card(open_bundle(write_hollow(tmp_path)), "owner/flowers", None)
    assert "license" not in plain
    assert "model-index" not in plain
