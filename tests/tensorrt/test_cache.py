"""A plan is loaded only if its hash, bundle and key match; otherwise a reason is given."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import EngineError
from sopdeploy.tensorrt.cache import NoEngine, StoredEngine, best_for, look
from sopdeploy.tensorrt.record import EngineRecord
from sopdeploy_export.tensorrt.engine import Engine, EngineOptions, get_engine
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.fake_tensorrt import FakeTensorRT
from tests.tensorrt.networks import write

Install = Callable[..., FakeTensorRT]
OPTIONS = EngineOptions(profiles="1,4")


@pytest.fixture
def built(bundle: Bundle, install: Install) -> Engine:
    install()
    return get_engine(bundle, OPTIONS)


def rebuilt_because(bundle: Bundle, options: EngineOptions = OPTIONS) -> str:
    """Rebuild the engine and give the reason."""
    again = get_engine(bundle, options)
    assert again.reason is not None
    assert isinstance(look(again.path.parent, again.record.key), StoredEngine)
    return again.reason


def damage(built: Engine, folder: Path) -> None:
    content = bytearray(built.path.read_bytes())
    content[-1] ^= 1
    built.path.write_bytes(content)


def link(built: Engine, folder: Path) -> None:
    built.path.rename(folder / "elsewhere")
    built.path.symlink_to(folder / "elsewhere")


def change_key(built: Engine, folder: Path) -> None:
    file = built.path.with_suffix(".json")
    key = {**built.record.key.model_dump(mode="json"), "precision": "fp16"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "key": key}))


def use_plan_of_another_bundle(built: Engine, folder: Path) -> None:
    other = get_engine(write(folder / "other", config={"width": 5}, wrong_by=1e-4), OPTIONS)
    built.path.write_bytes(other.path.read_bytes() + b" ")


CHANGES: dict[str, tuple[Callable[[Engine, Path], None], str]] = {
    "damaged": (damage, "does not have the sha256 of its record"),
    "a link": (link, "is missing or a link"),
    "with another key": (change_key, "precision fp16, not fp32"),
    "of another bundle": (use_plan_of_another_bundle, "does not have the sha256 of its record"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_plan_or_record_is_not_loaded(
    case: str, built: Engine, bundle: Bundle, tmp_path: Path
) -> None:
    change, reason = CHANGES[case]
    change(built, tmp_path)
    assert reason in rebuilt_because(bundle)


def test_the_plan_and_record_of_another_bundle_are_not_loaded(
    built: Engine, bundle: Bundle, tmp_path: Path
) -> None:
    other = get_engine(write(tmp_path / "other", config={"width": 5}), OPTIONS)
    assert other.record.key.name != built.record.key.name
    built.path.write_bytes(other.path.read_bytes())
    built.path.with_suffix(".json").write_bytes(other.path.with_suffix(".json").read_bytes())
    reason = rebuilt_because(bundle)
    assert "is an engine of another key: bundle tiny-" in reason


@pytest.mark.parametrize("content", [b"", b"{}", b"not JSON", b"[" * 100_000, b"\xff\xfe"])
def test_an_invalid_record_is_not_used(content: bytes, built: Engine, bundle: Bundle) -> None:
    built.path.with_suffix(".json").write_bytes(content)
    assert "is not an engine record" in rebuilt_because(bundle)


MACHINES: dict[str, tuple[Callable[[Install, FakeCuda], object], str, str]] = {
    "another TensorRT": (lambda install, _: install("11.1"), "1,4", "TensorRT 10.16.0, not 11.1.0"),
    "another GPU": (
        lambda _, cuda: vars(cuda).update(gpu_name="Fake B200", sm=(10, 0)),
        "1,4",
        "GPU Fake H200, not Fake B200; GPU architecture sm_90, not sm_100",
    ),
    "other profiles": (lambda *_: None, "1,8", "profiles 1,2-4, not 1,2-8"),
}


@pytest.mark.parametrize("case", MACHINES)
def test_another_machine_or_other_profiles_get_their_own_engine(
    case: str, built: Engine, bundle: Bundle, install: Install, cuda: FakeCuda
) -> None:
    change, profiles, difference = MACHINES[case]
    change(install, cuda)
    reason = rebuilt_because(bundle, EngineOptions(profiles=profiles))
    assert reason == f"the nearest engine here was built for {difference}"
    assert built.path.is_file()


def test_the_server_uses_the_engine_with_the_largest_batch_or_gets_a_reason(
    built: Engine, bundle: Bundle
) -> None:
    larger = get_engine(bundle, EngineOptions(profiles="1,16"))
    here = {"gpu": "Fake H200", "architecture": "sm_90"}
    found = best_for(built.path.parent, bundle, tensorrt="10.16.0", **here)
    assert isinstance(found, StoredEngine)
    assert found.record == larger.record
    missed = best_for(built.path.parent, bundle, tensorrt="8.6.1", **here)
    assert missed == NoEngine("the nearest engine here was built for TensorRT 10.16.0, not 8.6.1")


def test_a_record_round_trips_and_contains_no_path(built: Engine, tmp_path: Path) -> None:
    assert EngineRecord.from_bytes(built.record.to_bytes()) == built.record
    assert built.path.with_suffix(".json").read_bytes() == built.record.to_bytes()
    assert str(tmp_path) not in built.record.to_bytes().decode()


def test_an_unwritable_cache_is_an_error_that_names_the_option(
    bundle: Bundle, install: Install, tmp_path: Path
) -> None:
    install()
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"cannot be written .*; choose another --cache"):
        get_engine(bundle, EngineOptions(cache=tmp_path / "file"))
