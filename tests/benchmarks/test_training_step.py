"""The layers of the slides' table: SVD computes what eigenvalues do, and every part is measured."""

import pytest
import torch
from meta_layers import MetaLayer
from training_step import BASELINE, META_LAYERS, decomposition_result, meta_layer_results


@pytest.mark.parametrize("name", [name for name in META_LAYERS if name.endswith("SVD")])
def test_singular_values_give_the_vectors_of_eigenvalues(name: str) -> None:
    layer = MetaLayer(META_LAYERS[name], batch=1)
    torch.testing.assert_close(layer.forward(), layer.layer(layer.features), rtol=1e-2, atol=1e-3)


def test_each_layer_has_times_and_memory_next_to_those_of_isqrt_cov() -> None:
    results = meta_layer_results(["MPN-COV, EIG"], batch=1, runs=1)
    assert decomposition_result(1, "cpu").ours > 0
    assert [result.case.rpartition(", ")[2] for result in results] == ["FP+BP", "BP", "peak memory"]
    assert all(result.against == BASELINE and result.ours > 0 for result in results)
