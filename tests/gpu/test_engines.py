"""Real engines on a real GPU; skipped without one."""

from pathlib import Path

import numpy as np
import pytest

from sopdeploy.tensorrt.cache import StoredEngine, load_engine
from sopdeploy_export.engine_builder.engine import get_engine
from sopdeploy_export.options import EngineOptions
from sopdeploy_service.runtime.tensorrt import TensorRTRuntime
from sopdeploy_service.settings import Settings
from tests.tensorrt.networks import network, outputs_of, some_images, write

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]


def test_an_engine_reproduces_the_probes_and_is_then_cached(tmp_path: Path) -> None:
    bundle = write(tmp_path)
    built = get_engine(bundle, EngineOptions(profiles="1,4,16"))
    assert built.reason is not None
    assert isinstance(load_engine(built.path.parent, built.record.key), StoredEngine)
    assert get_engine(bundle, EngineOptions(profiles="1,4,16")).reason is None


def test_an_fp16_graph_becomes_an_engine(tmp_path: Path) -> None:
    bundle = write(tmp_path, network(half=True), precision="fp16")
    assert get_engine(bundle, EngineOptions(profiles="1,4")).reason is not None


def test_the_server_runs_every_batch_size_on_the_engine(tmp_path: Path) -> None:
    bundle = write(tmp_path)
    get_engine(bundle, EngineOptions(profiles="1,4,16"))
    runtime = TensorRTRuntime(bundle, Settings(runtime="tensorrt"))
    for count in (1, 3, 16):
        images = some_images(count)
        expected = outputs_of(network(), images)
        np.testing.assert_allclose(runtime.run(images)["logits"], expected, rtol=1e-4, atol=1e-2)


def test_overlapping_batches_give_their_own_outputs(tmp_path: Path) -> None:
    bundle = write(tmp_path)
    get_engine(bundle, EngineOptions(profiles="1,4,16"))
    runtime = TensorRTRuntime(bundle, Settings(runtime="tensorrt"))
    batches = [np.roll(some_images(count), 7 * count, axis=2) for count in (16, 4, 1, 16, 3, 1)]
    ends = [runtime.begin(list(batches[0]))]
    for number, images in enumerate(batches[1:]):
        ends.append(runtime.begin(list(images)))
        found = ends[number]()["logits"]
        np.testing.assert_allclose(found, outputs_of(network(), batches[number]), rtol=1e-4, atol=1e-2)
