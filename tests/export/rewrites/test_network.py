"""The rules on whole networks: what applies where, what is exported, and which errors are caught."""

import ast
import dataclasses
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

import sopdeploy_export
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import to_json
from sopdeploy.bundle.onnx_root import onnx_root
from sopdeploy.errors import BundleError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.replay import SOURCE, check_lowering
from sopdeploy_export.report.results import Exported
from sopdeploy_export.rewrites import mixture
from sopdeploy_export.rewrites.apply import lower_graph
from tests.export.conftest import GMSOP
from tests.export.once import graph_of
from tests.forged import forge


def test_rules_are_reported_with_place_and_precondition(preprocess: Preprocess) -> None:
    (rule,) = lower_graph(graph_of("gmsop-16-8-resnet18", preprocess, **GMSOP).model).rules
    assert (rule.name, rule.where) == (mixture.EXPERTS, "mixture")
    assert rule.precondition
    assert rule.effect


def test_exporter_imports_no_paper() -> None:
    folder = Path(sopdeploy_export.__file__).parent
    allowed = {"base", "registry", "stats"}
    for module in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sopdeploy.models."):
                assert str(node.module).split(".")[2] in allowed, f"{module.name} imports {node.module}"


def test_lowering_json_records_both_roots_and_every_rule(gated: Exported) -> None:
    written = json.loads((gated.path / "lowering.json").read_text())
    assert written == gated.lowering.model_dump(mode="json")
    assert written["certified_root"] == gated.certificate.roots.any_batch
    assert written["source_onnx_root"] == gated.certificate.roots.onnx
    assert written["lowered_onnx_root"] == gated.manifest.lineage.onnx_root
    assert gated.manifest.lineage.onnx_root == onnx_root(onnx.load(gated.path / "model.onnx"))
    assert gated.manifest.lineage.program_root == written["certified_root"]
    shown = check_lowering(open_bundle(gated.path))
    assert (
        shown
        == f"{len(gated.lowering.rules)} rewrite rules, replayed on the certified graph, give model.onnx"
    )
    assert gated.parity.passed
    assert gated.lowering.summary == {mixture.EXPERTS: 1}


def forge_source(folder: Path) -> None:
    """Change one number of the stored graph, as if another network had been certified."""
    source = onnx.load_from_string(gzip.decompress((folder / SOURCE).read_bytes()))
    tensor = next(t for t in source.graph.initializer if t.raw_data and t.data_type == onnx.TensorProto.FLOAT)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] += 1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    (folder / SOURCE).write_bytes(gzip.compress(source.SerializeToString(), mtime=0))


def forge_file(folder: Path) -> None:
    """Change one number of the exported graph; the certificate and the rules stay."""
    model = onnx.load(folder / "model.onnx")
    bias = next(t for t in model.graph.initializer if t.data_type == 1 and len(t.dims) == 1)
    values = numpy_helper.to_array(bias).copy()
    values.flat[0] += 1e-6
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))


def forge_report(folder: Path) -> None:
    report = json.loads((folder / "lowering.json").read_text())
    del report["rules"][-1]
    (folder / "lowering.json").write_bytes(to_json(report))


FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another source": (forge_source, "is not the certified graph"),
    "a changed file": (forge_file, "is not the certified graph|rules do not give model.onnx"),
    "a missing application": (forge_report, "rewrite rules do not give model.onnx"),
    "a source that is no archive": (lambda folder: (folder / SOURCE).write_bytes(b"x"), "cannot be read"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_replay_refuses_another_file_source_or_list(gated: Exported, tmp_path: Path, case: str) -> None:
    change, message = FORGED[case]
    copied = Path(shutil.copytree(gated.path, tmp_path / "copy"))
    change(copied)
    bundle = open_bundle(forge(copied))
    if case == "a changed file":  # also in the manifest and in lowering.json, as an attacker would
        root = onnx_root(onnx.load(copied / "model.onnx"))
        lineage = bundle.manifest.lineage.model_copy(update={"onnx_root": root})
        bundle = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"lineage": lineage}))
    with pytest.raises(BundleError, match=message):
        check_lowering(bundle)
