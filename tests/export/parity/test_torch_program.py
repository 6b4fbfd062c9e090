"""`network.pt2` holds the certified program and the kept tensors, and is reproducible."""

import copy
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

from sopdeploy.bundle.folder import PROGRAM, open_bundle
from sopdeploy.bundle.probes import read_probes
from sopdeploy.errors import CertificateError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.graph import Captured, capture_any_batch
from sopdeploy_export.parity.torch_program import check_program, serialize_program
from sopdeploy_export.proof.certificate import NetworkProof, certify
from sopdeploy_export.proof.networks import detach
from sopdeploy_export.results import Exported
from tests.export.conftest import BRANCHED, trained
from tests.export.once import proving_once

Proof = tuple[NetworkProof, dict[str, Captured]]


@pytest.fixture(scope="module")
def proof(preprocess: Preprocess, probes: torch.Tensor) -> Proof:
    network = trained()
    with proving_once(changes_program=True):  # as `branched`, whose programs are cached
        return certify(network, detach(network), preprocess, probes, model="dsop-resnet8", batch=BRANCHED)


def test_the_file_is_part_of_the_bundle_and_gives_its_logits(branched: Exported) -> None:
    bundle = open_bundle(branched.path)
    assert PROGRAM in bundle.manifest.files
    probes = read_probes(bundle.probes)
    program = torch.export.load(bundle.path / PROGRAM)
    for count in (1, 3):
        (logits,) = program.module()(torch.from_numpy(probes.images[:count]))
        drift = np.abs(logits.detach().numpy() - probes.expected["logits"][:count]).max()
        assert drift <= probes.tolerance["logits"]


def test_the_file_holds_the_kept_tensors_and_no_removed_one(branched: Exported) -> None:
    program = torch.export.load(branched.path / PROGRAM)
    removed = {entry.name for entry in branched.certificate.removed}
    names = {name.removeprefix("network.") for name in program.state_dict}
    assert removed
    assert not names & removed
    with zipfile.ZipFile(branched.path / PROGRAM) as archive:
        written = sum(i.file_size for i in archive.infolist() if "/data/weights/weight_" in i.filename)
        text = b"".join(archive.read(name) for name in archive.namelist())
    normalization = 2 * 3 * 4  # scale and offset per channel
    assert written == sum(entry.bytes for entry in branched.certificate.kept) + normalization
    assert not [name for name in removed if name.replace(".", "_").encode() in text]


def test_the_file_contains_no_path_no_source_line_and_no_pickle(branched: Exported) -> None:
    tensors = {
        tensor.detach().numpy().tobytes()
        for tensor in torch.export.load(branched.path / PROGRAM).state_dict.values()
    }
    with zipfile.ZipFile(branched.path / PROGRAM) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    here = str(Path(__file__).resolve().parents[3]).encode()
    traces = (here, str(Path(torch.__file__).parents[1]).encode(), b".py", b'File "', b"line ", b"data.pkl")
    for name, raw in content.items():
        if "/data/weights/weight_" in name:  # the numbers of a tensor may be any bytes
            assert raw in tensors, name
        else:
            assert not raw.startswith(b"\x80"), name
            assert [trace for trace in traces if trace in raw] == [], name


def test_the_file_is_reproducible_and_written_only_on_request(
    branched: Exported, gated: Exported, preprocess: Preprocess
) -> None:
    again = capture_any_batch(detach(trained()), preprocess, BRANCHED)
    assert serialize_program(again, branched.certificate) == (branched.path / PROGRAM).read_bytes()
    assert not (gated.path / PROGRAM).exists()


def saved(program: ExportedProgram) -> bytes:
    memory = io.BytesIO()
    torch.export.save(program, memory)
    return memory.getvalue()


def another_weight(proof: Proof) -> ExportedProgram:
    changed = copy.deepcopy(proof[1]["detached"].any_batch)
    with torch.no_grad():
        changed.state_dict["network.fc.bias"].add_(1e-3)
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda proof: proof[1]["trained"].any_batch, r"contains .*, which was removed"),
        (another_weight, "not the certified one"),
    ],
    ids=["the trained program", "another weight"],
)
def test_another_program_is_refused(proof: Proof, change: Any, message: str) -> None:
    with pytest.raises(CertificateError, match=f"{PROGRAM}: .*{message}"):
        check_program(saved(change(proof)), proof[0])


def test_a_tensor_in_a_larger_storage_is_refused(proof: Proof, monkeypatch: Any) -> None:
    content = serialize_program(copy.deepcopy(proof[1]["detached"].any_batch), proof[0])
    program = torch.export.load(io.BytesIO(content))
    bias = program.state_dict["network.fc.bias"]
    wide = torch.cat([bias.detach(), torch.zeros(90)])
    program.state_dict["network.fc.bias"] = wide[: len(bias)]
    monkeypatch.setattr(torch.export, "load", lambda _: program)
    with pytest.raises(CertificateError, match=r"storage of fc.bias is larger"):
        check_program(content, proof[0])
