"""Training and engines on a real GPU; skipped without one."""

from pathlib import Path

import numpy as np
import pytest

import sopdeploy
from sopdeploy_commands.engine_builder.engine import get_engine
from sopdeploy_export.options import EngineOptions
from sopdeploy_service.runtime.tensorrt import TensorRTRuntime
from sopdeploy_service.settings import Settings
from tests.tensorrt.networks import network, outputs_of, some_images, write

pytestmark = pytest.mark.usefixtures("cuda_device")


def test_digits_are_learned_on_cuda(tmp_path: Path) -> None:
    run = sopdeploy.train(
        recipe="digits-dsop", out=tmp_path / "run", device="cuda", progress=False
    )

    assert run.best_top1 is not None
    assert run.best_top1 >= 0.95  # 99 % on a CPU


@pytest.mark.usefixtures("tensorrt")
def test_an_engine_is_built_once_and_overlapping_batches_give_their_own_outputs(
    tmp_path: Path,
) -> None:
    bundle = write(tmp_path)
    options = EngineOptions(profiles="1,4,16")
    assert [get_engine(bundle, options).reason is None for _ in range(2)] == [False, True]

    runtime = TensorRTRuntime(bundle, Settings(runtime="tensorrt"))
    batches = [np.roll(some_images(count), 7 * count, axis=2) for count in (16, 4, 1, 3, 16, 1)]
    ends = [runtime.begin(list(batches[0]))]
    for number, images in enumerate(batches):
        ends += [
            runtime.begin(list(following)) for following in batches[number + 1 : number + 2]
        ]
        found = ends[number]()["logits"]
        np.testing.assert_allclose(found, outputs_of(network(), images), rtol=1e-4, atol=1e-2)
