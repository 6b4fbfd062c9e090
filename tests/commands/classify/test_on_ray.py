"""`classify --ray`: the rows of `classify`, from actors of Ray; most tests start real clusters."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sopdeploy.errors import ConfigError, RuntimeUnavailableError
from sopdeploy_commands.classify.classifier import BatchClassifier
from sopdeploy_commands.classify.options import ClassifyOptions
from tests.commands.classify.conftest import (
    BAD,
    OPTIONS,
    SETTINGS,
    StopError,
    classify,
    part_bytes,
    rows_of,
    stop_at,
    write_photos,
)
from tests.support.children import below, listening

pytest.importorskip("ray")
on_ray = import_module("sopdeploy_commands.classify.on_ray")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
MANY = 400
SMALL_PARTS = ClassifyOptions(workers=1, part_images=4)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two machines, each with room for both actors, without usage statistics and without a dashboard."""
    from ray.cluster_utils import Cluster

    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # `Cluster` writes its address to a folder `ray` there
        patch.setenv("RAY_TMPDIR", folder)
        (Path(folder) / "ray").mkdir()
        # Otherwise Ray writes a token to the home directory
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        head = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "temp_dir": folder}
        started = Cluster(initialize_head=True, head_node_args=head)

        try:
            yield started
        finally:
            started.shutdown()


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_every_image_has_its_row_once_if_a_machine_is_lost(cluster, bundle_path, tmp_path):
    """The rows are those of `classify`, also if it began them, and an interrupted run continues."""
    photos = write_photos(tmp_path / "photos", MANY // 2)
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as archive:
        archive.add(photos, "photos")
    sources = [str(photos), str(shard)]
    classify(bundle_path, sources, tmp_path / "here", options=SMALL_PARTS)
    out = tmp_path / "out"
    options = SMALL_PARTS.model_copy(update={"ray": cluster.address, "actors": 2})
    with pytest.raises(StopError):
        classify(bundle_path, sources, out, options=SMALL_PARTS, on_image=stop_at(8))
    written = set(part_bytes(out))
    other = cluster.add_node(num_cpus=2, num_gpus=0)
    nodes = set()

    def lose_a_machine(done: int, _total: int) -> None:
        if done > 4 * len(written) and not nodes:
            from ray._private.state import actors

            alive = [found for found in actors().values() if found["State"] == "ALIVE"]
            nodes.update(found["Address"]["NodeID"] for found in alive)
            cluster.remove_node(other, allow_graceful=False)

    found = classify(bundle_path, sources, out, options=options, on_image=lose_a_machine)
    assert len(nodes) == 2
    assert (found.num_images, found.num_errors) == (MANY, 2 * len(BAD))
    assert part_bytes(out) == part_bytes(tmp_path / "here")
    assert len({row["path"] for row in rows_of(out)}) == MANY


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_cluster_that_the_command_starts_listens_on_loopback_only(bundle_path, tmp_path):
    photos = write_photos(tmp_path / "photos", 2000)
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-m", "sopdeploy", "classify", str(bundle_path), str(photos)]
        command += ["--out", str(tmp_path / "out"), "--ray", "local", "--set", "part_images=4"]
        addresses: set[str] = set()

        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        ) as child:
            ended = threading.Event()
            while not ended.wait(0.2) and child.poll() is None:
                for process in (child.pid, *below(child.pid)):
                    with suppress(FileNotFoundError):  # it has ended
                        addresses |= set(map(str, listening(process)))

        assert child.returncode == 0

    assert addresses == {"127.0.0.1"}
    assert len(rows_of(tmp_path / "out")) == 2000


def test_actors_write_the_rows_of_classify_unless_theirs_would_differ(
    bundle_path, complete, tmp_path
):
    out = shutil.copytree(complete, tmp_path / "out")
    (out / "rows" / "part-00001.parquet").unlink()
    (out / "rows" / "part-00003.parquet").unlink()
    actor = on_ray.PartActor(
        bundle_path,
        SETTINGS,
        OPTIONS,
        out,
        BatchClassifier(bundle_path, SETTINGS, OPTIONS).state,
    )
    before = (out / "rows" / "part-00000.parquet").stat().st_mtime_ns

    assert actor({"part": np.arange(4)}) == {"images": [32, 32, 32, 4]}
    assert part_bytes(out) == part_bytes(complete)
    assert (out / "rows" / "part-00000.parquet").stat().st_mtime_ns == before

    state = BatchClassifier(bundle_path, SETTINGS, OPTIONS).state  # of another machine
    for change in {"runtime": "onnxruntime-cuda 1.31 on cuda:0"}, {"batch": 7}:
        with pytest.raises(ConfigError, match=r"onnxruntime .* on cpu"):
            on_ray.PartActor(
                bundle_path, SETTINGS, OPTIONS, complete, state.model_copy(update=change)
            )


def test_errors_of_a_cluster_are_one_line(bundle_path, photos, tmp_path):
    for address in ("127.0.0.1:9", "nonsense", "ray://127.0.0.1:10001", "[::1]:x"):
        with pytest.raises(ConfigError, match=r"^ray: .*`local`"):
            classify(
                bundle_path,
                [str(photos)],
                tmp_path / "out",
                options=ClassifyOptions(ray=address),
            )

    assert not (tmp_path / "out").exists()

    for text, kind, message in (
        ("Traceback\n  x\nsopdeploy.errors.ConfigError: a is b\n", ConfigError, "a is b"),
        ("The actor died\nOOM", RuntimeUnavailableError, "OOM"),
    ):
        with pytest.raises(kind, match=f"Ray cluster: {message}$"), on_ray.errors_of_actors():
            raise RuntimeError(text)
