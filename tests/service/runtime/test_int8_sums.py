"""Sums of int8 products are exact on this processor, whether or not it has VNNI."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sopdeploy.base import environment
from sopdeploy.base.environment import EXACT_INT8
from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.sealed import SealedFile
from sopdeploy_service.runtime import onnxruntime as runtime
from sopdeploy_service.runtime.onnxruntime import CPU, OnnxRuntime, session_options
from sopdeploy_service.settings import Settings
from tests.support.forged import graph

TENSORS = {
    "weights": np.full((8, 3, 5, 5), 127, np.int8),
    "scale": np.array(1.0, np.float32),
    "zero": np.array(0, np.uint8),
    "no_shift": np.zeros(8, np.int8),
    "one_each": np.ones(8, np.float32),
    "wide": np.array(255 * 127 * 3 * 5 * 5 / 200, np.float32),
}


PRODUCTS = """
products (uint8[n, 32, 32, 3] images) => (float[n, 8, 28, 28] logits)
<int8[8, 3, 5, 5] weights, float scale, uint8 zero, int8[8] no_shift, float[8] one_each, float wide>
{
    planes = Transpose <perm = [0, 3, 1, 2]> (images)
    codes = QLinearConv (planes, scale, zero, weights, one_each, no_shift, wide, zero)
    logits = Cast <to = 1> (codes)
}
"""


def test_the_largest_products_do_not_saturate(bundle: Bundle) -> None:
    products = SealedFile([graph(PRODUCTS, **TENSORS).SerializeToString()])
    opened = OnnxRuntime(replace(bundle, graph=products), Settings(threads=1))
    outputs = opened.run(np.full((1, 32, 32, 3), 255, np.uint8))

    assert np.unique(outputs["logits"]).tolist() == [200.0]


@pytest.mark.parametrize("lacks_vnni", [True, False])
def test_the_slow_exact_form_is_used_only_without_vnni(
    monkeypatch: pytest.MonkeyPatch, lacks_vnni: bool
) -> None:
    monkeypatch.setattr(runtime, "lacks_vnni", lambda: lacks_vnni)
    entries: list[tuple[str, str]] = []
    options = SimpleNamespace(add_session_config_entry=lambda *entry: entries.append(entry))
    library = SimpleNamespace(
        SessionOptions=lambda: options,
        GraphOptimizationLevel=SimpleNamespace(ORT_ENABLE_ALL=99),
    )
    session_options(library, 1, CPU)

    assert (EXACT_INT8 in entries) == lacks_vnni


# Machine, flags: lacks VNNI
PROCESSORS = {
    ("x86_64", "avx2 avx512f"): True, ("x86_64", "avx2 avx_vnni"): False,
    ("x86_64", "avx512f avx512_vnni"): False, ("x86_64", None): True,
    ("aarch64", "asimd"): False, ("arm64", None): False,
}  # fmt: skip


def test_vnni_counts_only_if_the_system_lists_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for (machine, flags), expected in PROCESSORS.items():
        cpuinfo = tmp_path / f"{machine} {flags}"
        if flags is not None:
            cpuinfo.write_text(f"flags : {flags}\n")
        monkeypatch.setattr(environment.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(environment, "CPUINFO", cpuinfo)

        assert environment.lacks_vnni() == expected


@pytest.mark.parametrize("threads", [1, 3])
def test_a_session_has_the_threads_of_the_setting(bundle: Bundle, threads: int) -> None:
    runtime = OnnxRuntime(bundle, Settings(threads=threads))
    assert runtime._session.get_session_options().intra_op_num_threads == threads

    runtime.close()
