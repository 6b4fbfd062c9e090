"""The page at `/` in a real browser."""

import json
import re
import subprocess
import sys
from importlib.resources import files
from typing import Any

import pytest

from sopdeploy_service.settings import Settings
from tests.service.api.pages.conftest import done, expected, give, shown

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_dropped_or_pasted_image_shows_the_classes_of_the_api(page, client, jpeg, kind):
    give(page, jpeg, kind=kind)
    assert shown(page) == expected(client, jpeg)
    assert len(shown(page)) == 5
    widths = page.locator("#classes .track > span").evaluate_all("all => all.map(e => e.clientWidth)")
    assert widths == sorted(widths, reverse=True)
    assert page.locator("#preview").evaluate("image => image.naturalWidth") == 50


def test_the_page_works_by_keyboard_alone(page, client, jpeg):
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "file":
            break
    outline = page.locator("#drop").evaluate("e => getComputedStyle(e).outlineStyle")
    assert outline == "solid", "the focus must be visible"
    choosers: list[Any] = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    while not choosers:  # a busy browser ignores the first keys
        page.keyboard.press("Enter")
        page.wait_for_timeout(500)
    choosers[0].set_files({"name": "a.jpg", "mimeType": "image/jpeg", "buffer": jpeg})
    done(page)
    assert shown(page) == expected(client, jpeg)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "top-k"
    page.keyboard.press("Control+A")
    page.keyboard.type("2")
    page.keyboard.press("Tab")
    page.wait_for_selector("#classes:not(:has(li:nth-child(3))) li:nth-child(2)")
    assert page.evaluate("document.activeElement.id") == "tab-curl"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-Python"
    assert page.locator("#code-Python").is_visible()


def test_the_page_is_accessible_to_screen_readers(page, client, jpeg):
    give(page, jpeg, type="image/png")
    assert page.locator("#warnings li").text_content().startswith("The content type names another format")
    rows = page.locator("#waterfall li > span:first-child").all_text_contents()
    assert rows == ["receive", "decode", "queue", "infer", "connection"]
    label, percent = expected(client, jpeg)[0]
    assert page.get_by_role("status").text_content().startswith(f"Prediction: {label} {percent}, ")
    nameless = page.locator("button, a, input, select").evaluate_all(
        "all => all.filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).length"
    )
    assert nameless == 0
    assert page.get_by_label("Drop another image").count() == 1


def test_a_bad_file_shows_the_error_and_the_next_image_a_prediction(page, client, jpeg):
    give(page, b"no picture", name="notes.txt", type="text/plain")
    problem = client.post("/v1/classify", content=b"no picture").json()
    alert = page.get_by_role("alert")
    assert alert.text_content().lower() == f"{problem['detail']}.{problem['code']}".lower()
    assert page.locator("#classes li").count() == 0
    give(page, jpeg)
    assert alert.is_hidden()
    assert shown(page) == expected(client, jpeg)


def test_an_unreachable_server_is_reported(page, jpeg):
    page.route("**/v1/classify**", lambda route: route.fulfill(status=200, body="not JSON"))
    give(page, jpeg)
    assert "cannot be reached" in page.get_by_role("alert").text_content()


def test_several_images_are_classified_and_listed(page, client, jpeg, make_picture):
    others = [make_picture((40 * number, 90, 200)) for number in range(7)]
    bodies = [jpeg, b"no picture", *others]
    chosen = [{"name": f"{n}.jpg", "mimeType": "image/jpeg", "buffer": body} for n, body in enumerate(bodies)]
    page.locator("#file").set_input_files(chosen)
    page.locator("#done", has_text="9 of 9").wait_for()
    results = page.locator("#list .result").all_text_contents()
    assert "not an image" in results.pop(1)
    assert results == [" ".join(expected(client, body)[0]) for body in (jpeg, *others)]
    assert page.locator("#list img").evaluate_all("all => all.map(e => e.naturalWidth > 0)") == [
        body != b"no picture" for body in bodies
    ]
    assert shown(page) == expected(client, jpeg)
    page.locator("#list button").nth(4).click()
    assert shown(page) == expected(client, others[2])
    page.locator("#list button").nth(1).click()
    assert page.get_by_role("alert").is_visible()


def test_a_phone_shows_the_answer_without_scrolling(open_page, client, jpeg):
    page = open_page(client.base_url, viewport={"width": 390, "height": 844})
    give(page, jpeg)
    answer = page.locator("#classes").bounding_box()
    assert answer["y"] + answer["height"] < 844


def test_words_say_what_is_being_done_with_each_of_several_images(page, jpeg):
    page.route("**/v1/classify**", lambda _route: None)  # no response
    chosen = [{"name": f"{number}.jpg", "mimeType": "image/jpeg", "buffer": jpeg} for number in range(6)]
    page.locator("#file").set_input_files(chosen)
    page.locator("#list .result").nth(3).filter(has_text=re.compile("Uploading|Classifying")).wait_for()
    words = page.locator("#list .result").all_text_contents()
    assert [re.sub("^(Uploading.*|Classifying)$", "busy", word) for word in words] == [
        *["busy"] * 4,
        *["Waiting"] * 2,
    ]
    assert page.locator("#progress").inner_text().startswith(("Uploading", "Classifying"))
    assert page.locator("#done").inner_text() == "0 of 6"


# The smallest contrast of a text on a page with its background (WCAG 2), and the element.
CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => channels(color).slice(0, 3).map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
  const background = (element) => {
    const color = element ? getComputedStyle(element).backgroundColor : "rgb(255, 255, 255)";
    return channels(color)[3] === 0 ? background(element.parentElement) : color;
  };
  const texts = [...document.body.querySelectorAll("*")].filter((element) => element.checkVisibility()
    && [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()));
  return texts.map((element) => {
    const [first, second] = [getComputedStyle(element).color, background(element)].map(luminance);
    const contrast = (Math.max(first, second) + 0.05) / (Math.min(first, second) + 0.05);
    return [contrast, element.outerHTML.slice(0, 90)];
  }).reduce((least, other) => (other[0] < least[0] ? other : least));
}"""


LOADED = {"/": "#proof :first-child", "/errors": ".panel"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", LOADED)
def test_every_text_has_the_contrast_that_wcag_requires(open_page, client, path, scheme):
    page = open_page(client.base_url, path, color_scheme=scheme)
    page.locator(LOADED[path]).first.wait_for()
    least, element = page.evaluate(CONTRAST)
    assert least >= 4.5, element


HARMFUL = 'it\'s "x" $(touch owned) `b` <img src=x onerror=alert(1)>.jpg'


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
def test_the_snippet_for_a_picture_gives_its_answer(page, client, jpeg, tmp_path, language):
    (tmp_path / HARMFUL).write_bytes(jpeg)
    give(page, jpeg, name=HARMFUL)
    code = page.locator(f"#code-{language} code").text_content()
    command = {
        "curl": ["sh", "-c", code],
        "Python": [sys.executable, "-c", code],
        # playwright brings its own node
        "JavaScript": [str(files("playwright") / "driver" / "node"), "--input-type=module", "--eval", code],
    }[language]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    expected = client.post("/v1/classify", content=jpeg).json()["classes"]
    if language == "curl":
        assert json.loads(ran.stdout)["classes"] == expected
    else:
        assert [line.split()[0] for line in ran.stdout.splitlines()] == [entry["label"] for entry in expected]
    assert [path.name for path in tmp_path.iterdir()] == [HARMFUL]


def test_the_copy_button_copies_the_code(page, client, jpeg):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    give(page, jpeg)
    page.get_by_label("Copy curl code").click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator("#code-curl code").text_content()


def test_the_experts_of_a_gate_are_shown(open_page, gated_client, make_picture):
    page = open_page(gated_client.base_url)
    page.get_by_text("sopdeploy verify .").wait_for()
    picture = make_picture((200, 190, 20), kind="PNG")
    give(page, picture, type="image/png")
    chosen = page.locator("#gates li.chosen .unseen").all_text_contents()
    gates = gated_client.post("/v1/classify?gates=true", content=picture).json()["gates"]
    assert sorted(chosen) == sorted(
        f"component {entry['component']}: {entry['weight']:.4f}" for entry in gates
    )
    assert page.locator("#gates li").count() == 4


def test_card_and_certificate_are_text_and_never_markup(open_page, gated_client):
    page = open_page(gated_client.base_url)
    page.get_by_text("sopdeploy verify .").wait_for()
    assert page.locator("#card strong").text_content() == "linear"
    assert page.locator("#card li").all_text_contents() == ["one entry\n  that goes on\n", "two"]
    assert "<img src=x" in page.locator("#card").text_content()
    assert page.locator("#card img").count() == 0
    assert "gate.noise (1 tensor, 8 bytes)" in page.locator("#proof").text_content()
    page.get_by_text("Hashes").click()
    assert page.locator("#proof details code").count() == 2
    assert page.locator("#proof details code").first.is_visible()


def test_of_several_models_one_is_chosen_and_asked(open_page, run_server, onnx_runtime, bundle, jpeg):
    with run_server(onnx_runtime, bundle, Settings(), names=("first", "second")) as client:
        page = open_page(client.base_url)
        give(page, jpeg)
        assert shown(page) == expected(client, jpeg, "?model=first")
        page.get_by_label("Model", exact=True).select_option("second")
        page.locator("h1", has_text="second").wait_for()
        done(page)
        assert shown(page) == expected(client, jpeg, "?model=second")
        assert "model=second" in page.locator("#code-curl code").text_content()
