"""The page at `/` in a real browser."""

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sopdeploy.bundle.decision import Decision, Rejection
from sopdeploy_service.settings import Settings
from tests.service.api.pages.conftest import SEND_FILE, done, expected, give, run_snippet, shown
from tests.support.fake_runtime import FakeRuntime
from tests.support.pictures import encoded
from tests.support.service import deciding, picture_bytes, running


def test_a_dropped_or_pasted_image_shows_the_classes_of_the_api(page, client, jpeg):
    other = picture_bytes((10, 200, 30))
    for kind, body in (("paste", other), ("drop", jpeg)):
        give(page, body, kind=kind)
        assert shown(page) == expected(client, body)

    assert len(shown(page)) == 5
    widths = page.locator("#classes .track > span").evaluate_all(
        "all => all.map(e => e.clientWidth)"
    )

    assert widths == sorted(widths, reverse=True)
    assert (
        page.locator("#preview").evaluate(
            "image => image.decode().then(() => image.naturalWidth)"
        )
        == 50
    )


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
    for name in ("folder", "use-camera"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == name
    page.keyboard.press("Tab")  # the timing
    page.keyboard.press("Tab")  # the part for developers
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "top-k"
    page.keyboard.press("Control+A")
    page.keyboard.type("2")
    page.keyboard.press("Tab")

    assert page.evaluate("document.activeElement.id") == "explain"
    page.wait_for_selector("#classes:not(:has(li:nth-child(3))) li:nth-child(2)")
    page.keyboard.press("Tab")

    assert page.evaluate("document.activeElement.id") == "tab-curl"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-Python"
    assert page.locator("#code-Python").is_visible()


def test_the_page_is_accessible_to_screen_readers(page, client):
    turned = Image.Exif()
    turned[0x0112] = 6
    body = encoded(Image.new("RGB", (40, 50), (200, 30, 60)), "JPEG", exif=turned)
    give(page, body)

    assert (
        page.locator("#warnings li").text_content()
        == "The image was rotated by its EXIF orientation."
    )

    rows = page.locator("#waterfall li > span:first-child").all_text_contents()
    assert rows == ["receive", "wait", "decode", "queue", "infer", "connection"]
    label, percent = expected(client, body)[0]
    assert (
        page.get_by_role("status").text_content().startswith(f"Prediction: {label} {percent}, ")
    )

    nameless = page.locator("button, a, input, select").evaluate_all(
        "all => all.filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).length"
    )
    assert nameless == 0
    assert page.get_by_label("Choose another image").count() == 1


def test_the_map_is_drawn_over_the_parts_on_which_the_class_depends(
    open_page, serve_with, onnx_runtime
):
    client = serve_with(onnx_runtime)
    picture = picture_bytes((30, 200, 60))
    page = open_page(client.base_url)
    page.locator("#developers > summary").click()
    page.locator("#explain").check()
    give(page, picture)
    page.locator("#map").wait_for()
    losses = client.post("/v1/classify?explain=true", content=picture).json()["explanation"]
    opacities = page.locator("#map").evaluate(
        "map => [...map.getContext('2d').getImageData(0, 0, 7, 7).data].filter((_, place) => place % 4 === 3)"
    )
    largest = max(map(max, losses))

    assert largest > 0
    expected = [110 + 80 * max(0, loss / largest) for row in losses for loss in row]
    assert opacities == pytest.approx(expected, abs=1)
    page.locator("#map").wait_for()  # the preview is decoded
    boxes = [page.locator(name).bounding_box() for name in ("#map", "#crop")]

    assert boxes[0] == pytest.approx(boxes[1], abs=1)
    page.locator("#explain").uncheck()
    page.locator("#map").wait_for(state="hidden")


def test_a_bad_file_shows_the_error_and_the_next_image_a_prediction(page, client, jpeg):
    give(page, b"no picture", name="notes.txt", type="text/plain")
    problem = client.post("/v1/classify", content=b"no picture").json()
    alert = page.get_by_role("alert")

    assert alert.text_content().lower() == f"{problem['detail']}.{problem['code']}".lower()
    assert page.locator("#classes li").count() == 0

    give(page, jpeg)
    assert alert.is_hidden()
    assert shown(page) == expected(client, jpeg)

    page.route("**/v1/classify**", lambda route: route.fulfill(status=200, body="not JSON"))
    give(page, jpeg)
    assert "cannot be reached" in alert.text_content()


def test_several_images_are_classified_and_listed(page, client, jpeg):
    others = [picture_bytes((40 * number, 90, 200)) for number in range(7)]
    bodies = [jpeg, b"no picture", *others]
    chosen = [
        {"name": f"{n}.jpg", "mimeType": "image/jpeg", "buffer": body}
        for n, body in enumerate(bodies)
    ]
    page.locator("#file").set_input_files(chosen)
    page.locator("#done", has_text="9 of 9").wait_for()
    results = page.locator("#list .result").all_text_contents()

    assert "not an image" in results.pop(1)
    answers = [expected(client, body)[0] for body in (jpeg, *others)]
    assert results == [" ".join(answer) for answer in answers]
    assert page.locator("#tag").text_content() == results[0]

    previews = page.locator("#list img").evaluate_all(
        "all => Promise.all(all.map(e => e.decode().then(() => true, () => false)))"
    )
    assert previews == [body != b"no picture" for body in bodies]
    assert shown(page) == expected(client, jpeg)

    page.locator("#list button").nth(4).click()
    assert shown(page) == expected(client, others[2])
    page.locator("#list button").nth(1).click()
    assert page.get_by_role("alert").is_visible()
    assert page.locator("#tag").is_hidden()

    # Counts by class, each of which shows its images only, and the order
    counts = Counter(label for label, _ in answers)
    buttons = page.locator("#counts button").all_text_contents()
    assert buttons[0] == "All 9"
    assert sorted(buttons[1:]) == sorted(
        ["(error) 1", *(f"{label} {count}" for label, count in counts.items())]
    )

    page.get_by_role("button", name="(error) 1").click()
    assert page.locator("#list li").count() == 1
    page.get_by_role("button", name="All 9").click()
    page.get_by_label("Order").select_option("least certain first")
    ordered = page.locator("#list .result").all_text_contents()
    shares = [float(text.split()[-2]) for text in ordered[1:]]

    assert "not an image" in ordered[0]
    assert shares == sorted(shares)


HARMFUL = 'it\'s "x" $(touch owned) `b` <img src=x onerror=alert(1)>.jpg'


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
def test_the_snippet_for_a_picture_gives_its_answer(page, client, jpeg, tmp_path, language):
    (tmp_path / HARMFUL).write_bytes(jpeg)
    give(page, jpeg, name=HARMFUL)
    code = page.locator(f"#code-{language} code").text_content()
    output = run_snippet(language, code, tmp_path)
    expected = client.post("/v1/classify", content=jpeg).json()["classes"]

    if language == "curl":
        assert json.loads(output)["classes"] == expected
    else:
        assert [line.split()[0] for line in output.splitlines()] == [
            entry["label"] for entry in expected
        ]
    assert [path.name for path in tmp_path.iterdir()] == [HARMFUL]


def test_card_and_certificate_are_text_and_never_markup(open_page, carded_client):
    page = open_page(carded_client.base_url)
    assert page.locator("#proof").is_hidden()  # folded
    page.get_by_text("For developers").click()
    page.get_by_text("sopdeploy verify .").wait_for()

    assert page.locator("#card strong").text_content() == "linear"
    assert page.locator("#card li").all_text_contents() == [
        "one entry\n  that goes on\n",
        "two",
    ]
    assert "<img src=x" in page.locator("#card").text_content()
    assert page.locator("#card img").count() == 0
    assert "gate.noise (1 tensor, 8 bytes)" in page.locator("#proof").text_content()

    page.get_by_text("Hashes").click()
    assert page.locator("#proof details code").count() == 2
    assert page.locator("#proof details code").first.is_visible()


def test_of_several_models_one_is_chosen_and_asked(open_page, onnx_runtime, bundle, jpeg):
    with running(onnx_runtime, bundle, Settings(), names=("first", "second")) as client:
        page = open_page(client.base_url)
        give(page, jpeg)
        assert shown(page) == expected(client, jpeg, "?model=first")
        page.get_by_label("Model", exact=True).select_option("second")
        page.locator("h1", has_text="second").wait_for()
        done(page)

        assert shown(page) == expected(client, jpeg, "?model=second")
        assert "model=second" in page.locator("#code-curl code").text_content()
        page.route(
            "**/v1/card**",
            lambda route: route.fulfill(status=404, json={"detail": "not there"}),
        )
        page.get_by_label("Model", exact=True).select_option("first")
        page.get_by_text("Not there.").wait_for()

        assert page.get_by_label("Model", exact=True).input_value() == "second"  # which answers


@pytest.mark.parametrize("cell", ["=1+1.jpg", "+1", "-1", "@a", "\tx", "a,=b"])
def test_no_cell_of_the_file_is_a_formula_for_a_spreadsheet(page, cell):
    written = page.evaluate("cell => csv([[cell]])", cell)
    (read,) = csv.reader(io.StringIO(written.removeprefix("\ufeff"), newline=""))

    assert written.startswith("\ufeff")
    assert read == [cell if cell[0] == "a" else f"'{cell}"]


BRIGHT, DARK = (picture_bytes((value, value, value)) for value in (250, 60))


class ContrastRuntime(FakeRuntime):
    """Logits whose spread is the mean of the image over 10, so that dark images have a low score."""

    def run(self, images):
        spread = images.mean(axis=(1, 2, 3), dtype=np.float32) / 10
        return {"logits": np.linspace(0, 1, 7, dtype=np.float32) * spread[:, None]}


def test_unknown_images_have_a_banner_and_gray_bars(open_page, bundle) -> None:
    rule = Decision(rejection=Rejection(threshold=15.0))
    with running(ContrastRuntime(num_classes=7), deciding(bundle, rule), Settings()) as client:
        found = [client.post("/v1/classify", content=body).json() for body in (BRIGHT, DARK)]
        assert [one["known"] for one in found] == [True, False]

        page = open_page(client.base_url)
        banner, status = page.locator("#unknown"), page.get_by_role("status")

        for body, answer in ((BRIGHT, found[0]), (DARK, found[1]), (BRIGHT, found[0])):
            give(page, body)
            assert banner.is_visible() is not answer["known"]
            is_gray = page.locator("#classes .label").evaluate_all(
                "all => all.every(e => getComputedStyle(e).color !== getComputedStyle(document.body).color)"
            )
            assert is_gray is not answer["known"]
            assert (
                status.text_content().startswith("Probably none of these; closest: ")
                is not answer["known"]
            )
            nearest = answer["classes"][0]["label"]
            assert page.locator("#classes .label").first.text_content() == nearest
            if not answer["known"]:
                assert banner.text_content() == f"Probably none of these. Closest: {nearest}"
                assert page.locator("#tag").text_content() == "Probably none of these"
                assert "%" not in "".join(
                    page.locator("#answer :is(#classes, #status)").all_text_contents()
                )

        give(page, DARK)
        give(page, b"no picture", name="notes.txt", type="text/plain")
        assert banner.is_hidden()


def test_examples_and_classes_are_offered_and_a_click_works(
    open_page, serve_with, onnx_runtime, tmp_path
):
    for number in range(20):
        path = tmp_path / "examples" / f"class {number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_bytes((number * 12, 200, 60)))
    client = serve_with(onnx_runtime, examples=tmp_path / "examples")
    page = open_page(client.base_url)
    page.wait_for_selector("#examples button")

    assert (
        page.locator("#labels li").all_text_contents()
        == client.get("/v1/card").json()["labels"]
    )
    assert (
        page.locator("#examples button").count()
        == len(client.get("/examples").json()["names"])
        <= 8
    )

    page.locator("#examples button").nth(1).click()
    done(page)
    assert shown(page) == expected(client, client.get("/examples/1").content)
    assert page.locator("#labels").is_hidden()
    assert not page.locator("#waterfall").is_visible()
    assert [client.get(f"/examples/{number}").status_code for number in ("99", "-1", "x")] == [
        404,
        404,
        422,
    ]


def test_a_phone_offers_its_camera_and_no_drop(open_page, client):
    phone = open_page(
        client.base_url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    )
    assert phone.get_by_text("Take a photo").is_visible()
    assert phone.locator(".others").is_hidden()
    assert phone.get_by_text("Choose a folder").is_hidden()
    assert phone.locator("#camera").get_attribute("capture") == "environment"

    desk = open_page(client.base_url)
    assert desk.get_by_text("Take a photo").is_hidden()


@pytest.mark.parametrize(("width", "is_phone"), [(390, True), (1280, False)])
def test_on_a_phone_the_prediction_stands_above_other_controls(
    open_page, client, jpeg, width: int, is_phone: bool
):
    page = open_page(client.base_url, viewport={"width": width, "height": 844})
    give(page, jpeg)
    answer, choices = (page.locator(name).bounding_box() for name in ("#answer", ".choices"))

    if is_phone:
        assert answer["y"] + answer["height"] <= choices["y"]
    else:
        assert answer["x"] >= choices["x"] + choices["width"]
    assert page.locator("#top-k").is_hidden()


def test_the_prediction_for_one_image_does_not_stay_under_the_next_one(
    open_page, serve_with, onnx_runtime
):
    client = serve_with(onnx_runtime)
    page = open_page(client.base_url)
    page.locator("#developers > summary").click()
    page.locator("#explain").check()
    give(page, picture_bytes((30, 200, 60)))
    page.locator("#map").wait_for()
    page.evaluate("askAll = async () => {}")  # no prediction arrives
    page.evaluate(
        SEND_FILE, ["drop", list(picture_bytes((200, 30, 60))), "b.jpg", "image/jpeg"]
    )

    assert page.locator("#classes li").count() == 0
    assert page.locator("#map").is_hidden()


def rows_of(page) -> list[dict[str, str]]:
    """Rows of the CSV file that the page saves."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as CSV").click()
    return list(
        csv.DictReader(
            io.StringIO(
                Path(download.value.path()).read_bytes().decode("utf-8-sig"), newline=""
            )
        )
    )


def drop_folder(page, folder: Path) -> None:
    """Drop *folder* as a file manager does."""
    box, session = page.locator("#drop").bounding_box(), page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        event = {"type": kind, "x": box["x"] + 20, "y": box["y"] + 20, "data": data}
        session.send("Input.dispatchDragEvent", event)


@pytest.fixture
def folder(tmp_path, jpeg) -> Path:
    """A folder with images in folders, other files, and names to quote."""
    files = {
        'b/"1", ok.jpg': jpeg,
        "b/10.jpg": jpeg,
        "b/2.jpg": jpeg,
        "a.png": b"no picture",
        "notes.txt": b"",
    }

    for name, body in {**files, ".hidden/3.jpg": jpeg}.items():
        path = tmp_path / "shop" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return tmp_path / "shop"


@pytest.mark.parametrize("way", ["dropped", "chosen"])
def test_the_images_of_a_folder_are_classified_as_by_the_command(
    page, client, jpeg, folder, way
):
    page.locator("h1", has_text="tiny").wait_for()
    if way == "dropped":
        drop_folder(page, folder)
    else:
        page.locator("#folder").set_input_files(folder)
    page.locator("#done", has_text="4 of 4").wait_for()
    rows = rows_of(page)

    assert [row["image"] for row in rows] == [
        "shop/a.png",
        'shop/b/"1", ok.jpg',
        "shop/b/2.jpg",
        "shop/b/10.jpg",
    ]

    best = client.post("/v1/classify", content=jpeg).json()["classes"][0]
    right = {
        "class": best["label"],
        "probability": f"{best['probability']:.4f}",
        "known": "",
        "error": "",
    }

    assert [{**row, "image": ""} for row in rows[1:]] == 3 * [{"image": "", **right}]
    assert [(row["class"], "not an image" in row["error"]) for row in rows[:1]] == [("", True)]


def test_a_folder_without_images_is_said_to_have_none(page, tmp_path):
    page.locator("h1", has_text="tiny").wait_for()
    (tmp_path / "notes.txt").write_bytes(b"")
    drop_folder(page, tmp_path)
    page.get_by_text("There are no images in this folder.").wait_for()


def test_two_models_answer_side_by_side_in_list_and_file(open_page, onnx_runtime, bundle, jpeg):
    with running(onnx_runtime, bundle, Settings(), names=("first", "second")) as client:
        page = open_page(client.base_url)
        page.get_by_label("Beside").select_option("second")
        give(page, jpeg)
        page.locator("#other-classes li").first.wait_for()
        labels = page.locator("#other-classes .label").all_text_contents()

        assert labels == [label for label, _ in expected(client, jpeg, "?model=second")]
        assert page.locator("#this-model").text_content() == "first"
        answer = {"classes": [{"label": "other", "probability": 0.5}], "warnings": []}
        page.route("**/v1/classify?*model=second*", lambda route: route.fulfill(json=answer))
        page.locator("#file").set_input_files(
            [{"name": f"{n}.jpg", "mimeType": "image/jpeg", "buffer": jpeg} for n in range(2)]
        )
        page.locator("#done", has_text="2 of 2").wait_for()

        assert "· second: other 50.0 %" in page.locator("#list .result").first.text_content()
        assert [row["class second"] for row in rows_of(page)] == ["other", "other"]
        page.unroute("**/v1/classify?*model=second*")
        page.route(
            "**/v1/classify?*model=second*",
            lambda route: route.fulfill(status=429, json={"detail": "no"}),
        )
        give(page, jpeg)
        page.locator("#other-note", has_text="No.").wait_for()

        assert shown(page) == expected(client, jpeg, "?model=first")
        page.get_by_label("Beside").select_option("")
        page.locator("#other").wait_for(state="hidden")


def test_the_answer_is_shown_while_its_explanation_is_made(
    open_page, serve_with, onnx_runtime, jpeg
):
    client = serve_with(onnx_runtime)
    held = list[Any]()
    page = open_page(client.base_url)
    page.route("**/v1/classify?*explain=true*", lambda route: held.append(route))
    page.locator("#developers > summary").click()
    page.locator("#explain").check()
    give(page, jpeg)

    assert shown(page) == expected(client, jpeg)
    page.get_by_role(
        "progressbar", name=re.compile("Finding the parts that decide, about .* s")
    ).wait_for()
    page.evaluate("showWhy(2)")  # two seconds instead of the few milliseconds of this network
    values = [page.locator("#why-bar").evaluate("bar => bar.value")]
    while len(values) < 3:
        page.wait_for_timeout(200)
        values.append(page.locator("#why-bar").evaluate("bar => bar.value"))

    assert values == sorted(values)
    assert 0 <= values[0] < values[-1] < 1
    held[0].continue_()
    page.locator("#map").wait_for()

    assert page.locator("#why").is_hidden()
    give(page, picture_bytes((9, 200, 60)))
    while len(held) < 2:
        page.wait_for_timeout(10)
    held[1].fulfill(status=429, json={"detail": "too busy"})
    page.locator("#why-text", has_text="Too busy.").wait_for()

    assert page.locator("#classes li").count() == 5


def test_a_wrong_answer_is_reported_only_where_images_are_kept(
    open_page, serve_with, client, onnx_runtime, jpeg, tmp_path
):
    page = open_page(client.base_url)
    give(page, jpeg)
    assert page.locator("#report").is_hidden()
    keeping = serve_with(onnx_runtime, keep=tmp_path / "kept", keep_sample=0)
    page = open_page(keeping.base_url)
    give(page, jpeg)
    page.get_by_text("This is wrong").click()
    page.get_by_label("Another one").fill("a" * 100)
    page.evaluate("document.getElementById('right').value += '\\u200b\\u0007'")
    page.get_by_role("button", name="Send").click()
    page.locator("#report-note", has_text="control characters").wait_for()
    label = keeping.get("/v1/card").json()["labels"][2]
    page.locator("#right-classes").get_by_role("button", name=label, exact=True).click()
    page.get_by_text("Sent. If there is room, it waits for a label.").wait_for()
    while not (kept := list((tmp_path / "kept").glob("*/*.json"))):
        page.wait_for_timeout(20)
    record = json.loads(kept[0].read_text(encoding="utf-8"))["data"]

    assert "reported" in record["reasons"]
    assert record["suggested"] == label
    page.get_by_label("Another one").fill("a new class")
    page.get_by_role("button", name="Send").click()
    while "a new class" not in kept[0].read_text(encoding="utf-8"):
        page.wait_for_timeout(20)

    assert shown(page) == expected(keeping, jpeg)


def test_a_laptop_photographs_with_its_camera_until_it_is_turned_off(page):
    page.get_by_role("button", name="Use the camera").click()
    while not page.locator("#video").evaluate("video => video.videoWidth"):
        page.wait_for_timeout(20)

    assert page.evaluate("document.activeElement.id") == "snap"

    page.keyboard.press("Enter")
    done(page)
    assert page.locator("#file-note", has_text="camera.jpg").count() == 1
    assert page.locator("#classes li").count() == 5

    page.evaluate("track = document.getElementById('video').srcObject.getTracks()[0]")
    page.get_by_role("button", name="Turn the camera off").click()
    assert page.evaluate("track.readyState") == "ended"
    assert page.evaluate("document.activeElement.id") == "use-camera"


def test_a_camera_that_is_refused_is_said_in_a_sentence(page):
    page.evaluate(
        "() => { navigator.mediaDevices.getUserMedia = async () => { throw new Error(); }; }"
    )
    page.get_by_role("button", name="Use the camera").click()
    page.get_by_text("The camera cannot be used; allow it for this page").wait_for()
