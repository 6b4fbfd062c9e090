"""`sopdeploy doctor` against servers with a known bottleneck."""

import pytest
from fake_runtime import FakeRuntime
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy.doctor import Diagnosis, examine
from sopdeploy.errors import ConfigError, DataError, ServiceError, UnreachableError
from sopdeploy_service.settings import Settings


@pytest.mark.slow  # measures the load of the machine too
def test_a_slow_model_is_found(serve_with):
    server = serve_with(FakeRuntime(num_classes=7, fixed_ms=100, largest_batch=2))
    found = examine(str(server.base_url), seconds=4, concurrency=8)
    assert found.advice.limit == "runtime"
    assert found.best.runtime_busy > 0.85
    assert found.best.mean_batch > 1.5
    assert "--max-batch" in found.advice.change
    assert "this machine" in found.notes[0]
    assert found.stopped is None


@pytest.mark.slow
def test_a_small_queue_is_found_and_its_retry_times_are_respected(serve_with):
    server = serve_with(FakeRuntime(num_classes=7, fixed_ms=4), queue_size=1, max_images=1)
    found = examine(str(server.base_url), seconds=3, concurrency=4)
    assert found.advice.limit == "queue"
    assert found.advice.change.startswith("--queue-size")
    refused = sum(step.refused.get("queue_full", 0) for step in found.steps)
    assert 0 < refused <= 4 * (3 + 2)  # four clients, each at most once a second


class Breaks(FakeRuntime):
    """Runs `left` batches, then raises."""

    left = 12

    def run(self, images):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("no")
        return super().run(images)


def test_an_error_ends_the_load_immediately(serve_with):
    runtime = Breaks(num_classes=7, fixed_ms=20)
    server = serve_with(runtime)
    found = examine(str(server.base_url), seconds=60, concurrency=1)
    assert "inference_failed" in found.stopped
    assert found.best.seconds < 30
    assert -10 < runtime.left < 0


def test_no_response_under_load_is_an_error(serve_with):
    runtime = Breaks(num_classes=7)
    runtime.left = 4  # those before the load
    with pytest.raises(ServiceError, match=r"no request was completed under load.*inference_failed"):
        examine(str(serve_with(runtime).base_url), seconds=2, concurrency=2)


def test_unusable_arguments_raise_the_matching_error(serve_with, tmp_path):
    with pytest.raises(UnreachableError):
        examine("http://127.0.0.1:9", seconds=1)
    server = serve_with(FakeRuntime(num_classes=7))
    with pytest.raises(ConfigError, match=r"model='other': choose.*tiny"):
        examine(str(server.base_url), model="other")
    with pytest.raises(DataError, match="contains no image"):
        examine(str(server.base_url), images=tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"text")
    with pytest.raises(ServiceError, match="not_an_image"):
        examine(str(server.base_url), images=tmp_path)


def test_several_models_require_a_name(run_server, bundle):
    runtime = FakeRuntime(num_classes=7, fixed_ms=5)
    with run_server(runtime, bundle, Settings(), names=("a", "b")) as server:
        with pytest.raises(ConfigError, match="a, b"):
            examine(str(server.base_url), seconds=1)
        found = examine(str(server.base_url), seconds=1, concurrency=2, model="b")
    assert found.model == "b"
    assert any("several models" in note for note in found.notes)


def test_the_command_prints_a_table_or_json(serve_with, monkeypatch):
    server = serve_with(FakeRuntime(num_classes=7, fixed_ms=20, largest_batch=2))
    arguments = ["doctor", "--url", str(server.base_url), "--seconds", "1", "--concurrency", "4"]
    found = Diagnosis.model_validate_json(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [step.concurrency for step in found.steps] == [1, 2, 4]
    monkeypatch.setattr("sopdeploy.doctor.examine", lambda *_, **__: found)
    shown = CliRunner().invoke(app, arguments)
    assert (shown.exit_code, shown.stderr) == (0, "")
    advice = found.advice
    for text in (advice.why, advice.change, advice.gain):
        assert f"{text}\n" in shown.stdout


def test_an_invalid_url_exits_with_code_2():
    found = CliRunner().invoke(app, ["doctor", "--url", "nonsense"])
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.startswith("error: 'nonsense'")
