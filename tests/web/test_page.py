"""The written page in Chromium: answers of the server, without a connection to one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sopdeploy.bundle.folder import Bundle
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.web.chromium import PageReport
from sopdeploy_export.web.site import fill_site
from sopdeploy_service.commands.predict import predict_files
from tests.service.api.pages.conftest import SEND_FILE
from tests.service.conftest import picture_bytes
from tests.web.conftest import KNOWN, RULES, tiny

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("linked_runtime")]
SIGMOID = {"activation": "sigmoid", "thresholds": (0.5, 0.2, 0.9, 0.6, 0.4, 0.5, 0.7)}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    found = tiny(tmp_path / "bundles", rejection=KNOWN)
    (tmp_path / "site").mkdir()
    fill_site(found, tmp_path / "site")
    return found


def give(page: Any, body: bytes) -> str:
    """Drop a file on the page; return its status after the answer."""
    page.evaluate(SEND_FILE, ["drop", list(body), "a.jpg", "image/jpeg"])
    page.wait_for_selector("#classes[aria-busy=false]", state="attached")
    return str(page.get_by_role("status").text_content())


def expected(bundle: Bundle, file: Path) -> tuple[list[str], str]:
    """The best classes and the status that the page shows, from the answer of the server's code."""
    [answer] = predict_files(bundle.path, [file])
    classes = [f"{entry.label} {100 * entry.probability:.1f} %" for entry in answer.classes[:5]]
    return (
        classes,
        f"{'known' if answer.known else 'probably none of the classes'} (score {answer.score:.3f})",
    )


def test_the_page_gives_the_answers_of_the_server_also_offline(
    bundle: Bundle, served: str, open_page: Callable[..., Any], tmp_path: Path
) -> None:
    page = open_page(served, "/site/")
    page.get_by_text("Ready").wait_for()
    page.evaluate("navigator.serviceWorker.ready.then(() => null)")
    for offline, color in ((False, (250, 250, 10)), (True, (20, 30, 20))):
        page.context.set_offline(offline)
        page.reload()
        page.get_by_text("Ready").wait_for()
        (tmp_path / "a.jpg").write_bytes(picture_bytes(color))
        status = give(page, (tmp_path / "a.jpg").read_bytes())
        classes, known = expected(bundle, tmp_path / "a.jpg")
        assert page.locator("#classes li").all_text_contents() == classes
        assert known in status
        assert status.startswith(("stable · ", "not stable: another device may give another class · "))
    assert "This image cannot be read" in give(page, b"no image")
    assert page.locator("#classes li").count() == 0


def test_without_a_camera_the_page_says_so_and_goes_on(
    bundle: Bundle, served: str, open_page: Callable[..., Any]
) -> None:
    page = open_page(served, "/site/")
    page.get_by_text("Ready").wait_for()
    page.get_by_role("button", name="Camera").click()
    page.get_by_text("The camera cannot be used: ").wait_for()
    assert "known" in give(page, picture_bytes())


def test_a_page_with_another_network_starts_with_an_error(
    bundle: Bundle, served: str, open_page: Callable[..., Any], tmp_path: Path
) -> None:
    other = tiny(tmp_path / "other", seed=1)
    (tmp_path / "site" / "model.onnx").write_bytes(other.onnx.read_bytes())
    page = open_page(served, "/site/")
    page.get_by_text("This browser cannot run the network: a logit deviates by").wait_for()


FOR_GPUS = """
import { InferenceSession as Session, Tensor, env } from "./ort.wasm.min.mjs";
const create = async (model) => {
  const session = await Session.create(model);
  return { run: async (...given) => {
    const found = await session.run(...given);
    found.logits.data[0] += CHANGE;
    return found;
  } };
};
export const InferenceSession = { create };
export { Tensor, env };
"""  # in place of onnxruntime-web's build for WebGPU


@pytest.mark.parametrize(
    ("adapter", "change", "status"),
    [("{}", 0, "Ready, on the GPU"), ("{}", 1, "Ready"), ("null", 0, "Ready")],
    ids=["the same logits", "other logits", "no adapter"],
)
def test_the_page_uses_a_gpu_only_if_it_gives_the_logits_of_the_export(
    adapter: str, change: int, status: str, served: str, tmp_path: Path, chromium: Any
) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    fill_site(tiny(tmp_path / "bundles"), folder, webgpu=True)
    (folder / "ort.webgpu.min.mjs").unlink()
    (folder / "ort.webgpu.min.mjs").write_text(FOR_GPUS.replace("CHANGE", str(change)))
    page = chromium.new_context().new_page()
    gpu = f"{{ value: {{ requestAdapter: async () => ({adapter}) }}, configurable: true }}"
    page.add_init_script(f"Object.defineProperty(Navigator.prototype, 'gpu', {gpu})")
    page.goto(f"{served}/site/")
    page.get_by_text("Ready").wait_for()
    assert page.get_by_role("status").text_content() == status
    assert "stable" in give(page, picture_bytes())
    page.context.close()


@pytest.mark.parametrize(
    ("rules", "decision"),
    [
        (Preprocess(resize=36, crop=32), {"margin": None}),
        (Preprocess(resize=36, crop=32, fit="pad", background=(10, 20, 30)), SIGMOID),
        (
            Preprocess(resize=70, crop=32, fit="squash", interpolation="bicubic"),
            {"rejection": KNOWN.model_copy(update={"score": "max_probability", "threshold": 0.5})},
        ),
    ],
    ids=[
        "bilinear, no rule and no stable answer",
        "padded, several classes per image",
        "squashed, score is a probability",
    ],
)
def test_all_rules_replay(
    rules: Preprocess, decision: dict[str, Any], tmp_path: Path, replay: Callable[[Path], PageReport]
) -> None:
    (tmp_path / "site").mkdir()
    steps = fill_site(tiny(tmp_path / "bundles", rules, **decision), tmp_path / "site")
    report = replay(tmp_path / "site")
    assert (report.failure, report.steps) == ("", steps)


def test_rules_that_ignore_exif_are_refused(tmp_path: Path, replay: Callable[[Path], PageReport]) -> None:
    (tmp_path / "site").mkdir()
    fill_site(
        tiny(tmp_path / "bundles", RULES.model_copy(update={"exif_orientation": False})), tmp_path / "site"
    )
    assert replay(tmp_path / "site").failure.startswith("turn.jpg: the step `decode` fails in this browser")
