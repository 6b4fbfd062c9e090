"""Software bills of materials are valid, complete and reproducible."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sbom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from locks import read_licences, read_lock

import sopdeploy

ROOT = Path(__file__).parents[2]
LOCK_FILES = {name: ROOT / "deploy" / "lock" / f"{name}.txt" for name in sbom.LOCKS}
TEXTS = {name: sbom.make_sbom(name) for name in sbom.LOCKS}
BOMS: dict[str, Any] = {name: json.loads(text) for name, text in TEXTS.items()}
BOTH = pytest.mark.parametrize("name", sbom.LOCKS)


@BOTH
def test_it_matches_the_cyclonedx_schema(name: str) -> None:
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(TEXTS[name]) is None
    assert validator.validate_str(TEXTS[name].replace('"alg": "SHA-256"', '"alg": "SHA-255"')) is not None


@BOTH
def test_it_lists_exactly_the_locked_packages_with_their_hashes(name: str) -> None:
    text = LOCK_FILES[name].read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", text.strip())
    expected = {
        re.match(r"[\w.-]+==\S+", entry)[0]: set(re.findall(r"sha256:(\w{64})", entry))  # type: ignore[index]
        for entry in entries
    }
    found = {
        f"{part['name']}=={part['version']}": {h["content"] for h in part["hashes"]}
        for part in BOMS[name]["components"]
    }
    assert found == expected
    assert sum(map(len, found.values())) == text.count("--hash=sha256:")


@BOTH
def test_it_names_the_project_its_direct_dependencies_and_platforms(name: str) -> None:
    ours = BOMS[name]["metadata"]["component"]
    assert (ours["name"], ours["version"]) == ("sopdeploy", sopdeploy.__version__)
    (asked,) = [d["dependsOn"] for d in BOMS[name]["dependencies"] if d["ref"] == ours["bom-ref"]]
    names = {re.match(r"pkg:pypi/(.*)@", ref)[1] for ref in asked}  # type: ignore[index]
    assert names == sbom.direct_dependencies(name)
    properties = {part["name"]: part.get("properties") for part in BOMS[name]["components"]}
    assert properties["colorama"][0]["value"] == "sys_platform == 'win32'"
    assert properties["fastapi"] is None


def test_licenses_of_all_locked_packages_are_known() -> None:
    locked = {f"{p.name}=={p.version}" for path in LOCK_FILES.values() for p in read_lock(path)}
    assert set(read_licences()) == locked, "run `make lock`"
    without = [name for name, found in read_licences().items() if not found]
    assert len(without) < len(locked) / 10


@BOTH
def test_declared_licenses_are_spdx_expressions(name: str) -> None:
    found = {part["name"]: part.get("licenses") for part in BOMS[name]["components"]}
    assert found["fastapi"] == [{"license": {"acknowledgement": "declared", "id": "MIT"}}]
    assert found["cryptography"] == [
        {"acknowledgement": "declared", "expression": "Apache-2.0 OR BSD-3-Clause"}
    ]
    assert [len(found["orjson"])] == [len(names) for key, names in read_licences().items() if "orjson" in key]


def test_it_is_reproducible_has_no_timestamp_and_a_serial_number_of_its_content() -> None:
    program = "import sys; sys.path.insert(0, 'deploy'); import sbom; print(end=sbom.make_sbom('cpu'))"
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program]
        assert subprocess.check_output(command, text=True, cwd=ROOT, env=environment) == TEXTS["cpu"]
    assert "timestamp" not in TEXTS["cpu"]
    numbers = {BOMS[name]["serialNumber"] for name in sbom.LOCKS}
    numbers.add(json.loads(sbom.make_sbom("cpu", "9.9.9"))["serialNumber"])
    assert len(numbers) == 3


def test_a_lock_without_hashes_is_rejected(tmp_path: Path) -> None:
    lock = tmp_path / "cpu.txt"
    lock.write_text("fastapi==0.115.0\n")
    with pytest.raises(ValueError, match=re.escape("cpu.txt: not a version with hashes: fastapi==0.115.0")):
        read_lock(lock)
