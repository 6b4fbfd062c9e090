"""The label page in a real browser: keys, touch, undo, new classes, reload, and names with markup."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from sopdeploy.photos.files import name_id
from sopdeploy_service.labelling.label import app
from sopdeploy_service.labelling.label.folders import LabelFolders
from sopdeploy_service.labelling.label.heap import Vector
from tests.service.labelling.label.conftest import (
    KEY,
    LABELS,
    files_below,
    identity,
    label_server,
)
from tests.service.labelling.label.test_heap import embed
from tests.support.service import picture_bytes


@pytest.fixture
def open_label_page(open_page, open_folders):
    """`open_label_page(**traits)` starts a server and opens its page."""
    with label_server(open_folders()) as client:

        def open_one(**traits):
            page = open_page(client.base_url, f"/?key={KEY}", **traits)
            page.wait_for_selector("#classes li, #empty:not([hidden])", state="attached")
            page.wait_for_selector("#grid[aria-busy=false]", state="attached")
            page.locator("#one-by-one").click()
            return page

        yield open_one


def press(page, key: str, left: int) -> None:
    """Press *key* and wait until *left* photographs are left."""
    page.keyboard.press(key)
    wait_until(page, left)


def wait_until(page, left: int) -> None:
    page.locator("#progress", has_text=f", {left} left").wait_for()
    page.locator("#main[aria-busy=false]").wait_for(state="attached")


def test_keys_label_skip_and_undo_and_a_reload_goes_on(keep, open_label_page, tmp_path):
    for number in range(6):
        keep(number, [float(number), 1.0, 2.5], known=False if number == 0 else None)
    page = open_label_page()
    shown = []

    def identity_shown() -> str:
        shown.append(page.evaluate("state.photograph.id"))
        return shown[-1]

    first = identity_shown()
    assert page.locator("#photo").evaluate(
        "image => image.decode().then(() => image.naturalWidth > 0)"
    )
    best = page.locator("#classes .name").first.text_content()
    press(page, "1", 5)
    assert files_below(tmp_path / "photos") == {f"{best}/{first}.jpg"}
    second = identity_shown()
    press(page, "x", 4)
    assert files_below(tmp_path / "photos-unknown") == {f"{second}.jpg"}
    skipped = identity_shown()
    press(page, "s", 3)
    press(page, "u", 4)
    assert page.evaluate("state.photograph.id") == skipped
    press(page, "u", 5)
    assert page.evaluate("state.photograph.id") == second
    assert not (tmp_path / "photos-unknown").exists()
    page.reload()
    page.wait_for_selector("#classes li")
    assert page.locator("#progress").text_content() == (
        "1 done in this session, 5 left; 0 of the 30 that decide, 1 that train, from 1 day; "
        "no photo that decides is left, and a larger keep_sample keeps more"
    )
    for left in range(4, -1, -1):
        press(page, "2", left)
    assert page.locator(
        "#empty", has_text="No photo is left to label. Next: sopdeploy train"
    ).is_visible()
    assert page.locator("#photo").is_hidden()
    assert page.locator("#new").is_hidden()
    assert len(files_below(tmp_path / "photos")) == 6
    page.keyboard.press("1")
    assert page.locator("#error").is_hidden()


def test_a_new_class_is_typed_after_its_key_and_offered_from_then_on(
    keep, open_label_page, tmp_path
):
    for number in range(3):
        keep(number)
    page = open_label_page()
    page.keyboard.press("n")
    page.keyboard.type("snow boots")  # with the letters of other keys
    press(page, "Enter", 2)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["snow boots"]
    assert page.locator("#classes .name").all_text_contents() == [*LABELS, "snow boots"]
    press(page, "4", 1)
    assert len(files_below(tmp_path / "photos" / "snow boots")) == 2
    page.keyboard.press("n")
    page.keyboard.type("../hat")
    page.keyboard.press("Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "leave out control and invisible characters" in page.locator("#error").text_content()
    assert page.locator("#name").input_value() == "../hat"  # to correct it


MANY = tuple(f"kind {number:02d}" for number in range(60))


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800)])
def test_many_classes_are_filtered_and_leave_the_controls_in_view(
    keep, open_label_page, tmp_path, width, height
):
    for number in range(3):
        likely = [4.0 if place in {41, 7 + number} else 0.0 for place in range(60)]
        keep(number, likely, labels=MANY)
    page = open_label_page(viewport={"width": width, "height": height})
    names = page.locator("#classes .name").all_text_contents()
    assert set(names[:2]) <= {"kind 41", *MANY[7:10]}
    assert names[5:] == sorted(names[5:])  # behind the most probable ones
    for control in ("#photo", "#filter", "#name", "#skip"):
        box = page.locator(control).bounding_box()
        assert box["y"] + box["height"] <= height, control

    page.keyboard.press("/")
    page.keyboard.type("KIND 3")
    visible = page.locator("#classes li:visible .name")
    assert sorted(visible.all_text_contents()) == [*MANY[30:40]]
    page.keyboard.type("x")
    assert page.locator("#no-match").is_visible()
    page.keyboard.press("Enter")  # no label
    page.keyboard.press("Escape")
    assert visible.count() == 60
    page.keyboard.press("/")
    page.keyboard.type("33")
    press(page, "Enter", 2)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["kind 33"]
    assert visible.count() == 60
    best = page.locator("#classes .name").first.text_content()
    press(page, "1", 1)
    assert (tmp_path / "photos" / best).is_dir()


def pressed(page) -> list[bool]:
    shown = page.locator("#next button").evaluate_all(
        "all => all.map((one) => one.ariaPressed)"
    )
    return [value == "true" for value in shown]


@pytest.fixture
def half_sorted(tmp_path) -> LabelFolders:
    """Eight photographs of a and of b, two of each sorted, so that classes of the others are suggested."""
    (tmp_path / "heap").mkdir()
    for number in range(16):
        path = tmp_path / "heap" / f"{'ab'[number % 2]}{number // 2}.jpg"
        path.write_bytes(picture_bytes((number, 100, 200)))
    folders = LabelFolders(tmp_path / "heap", tmp_path / "photos", embed)
    folders.suggestions.thread.join()
    for name in ("a0", "a1", "b0", "b1"):
        folders.label(name_id(f"{name}.jpg"), name[0])
    return folders


def test_photographs_that_are_chosen_in_the_grid_get_one_label(
    half_sorted, open_page, tmp_path
):
    with label_server(half_sorted) as client:
        page = open_page(client.base_url, f"/?key={KEY}")
        page.wait_for_selector("#grid[aria-busy=false]", state="attached")
        assert page.locator("#main").is_visible()  # a suggestion is no label
        page.keyboard.press("g")
        page.locator("#kinds button", has_text="b 6").click()
        page.get_by_role("button", name="Label 0 as b").wait_for()
        cells = page.locator("#cells button")
        assert cells.first.locator("img").evaluate(
            "image => image.decode().then(() => image.naturalWidth > 0)"
        )

        # One after the other, with the key Shift those in between, and one again
        ids = page.evaluate("cells()")
        cells.nth(1).click()
        cells.nth(4).click(modifiers=["Shift"])
        cells.nth(2).focus()
        page.keyboard.press("Space")
        page.keyboard.press("1")  # no key of one photograph
        assert page.locator("#kind").text_content() == "3 of 6 chosen"
        page.get_by_role("button", name="Label 3 as b").click()
        wait_until(page, 9)
        page.locator("#kinds button", has_text="b 3").wait_for()
        assert {one in half_sorted.waiting for one in (ids[0], ids[2], ids[5])} == {True}
        assert len(files_below(tmp_path / "photos" / "b")) == 5


def test_rejected_photographs_that_look_alike_get_the_name_of_a_new_class(
    keep, open_page, tmp_path
) -> None:
    names = [keep(number, reasons=("unknown",), known=False) for number in range(8)]

    def embed_kinds(paths: Sequence[Path]) -> Iterator[tuple[Path, Vector]]:
        for path in paths:
            yield path, np.eye(2, dtype=np.float32)[int(path.stem in names[:6])]

    folders = LabelFolders(tmp_path / "kept", tmp_path / "photos", embed_kinds)
    folders.suggestions.thread.join()
    with label_server(folders) as client:
        page = open_page(client.base_url, f"/?key={KEY}")
        page.wait_for_selector("#grid[aria-busy=false]", state="attached")
        page.keyboard.press("g")
        page.locator("#kinds button", has_text="a new class? 8").wait_for()
        assert page.evaluate("cells()")[:6] == sorted(names[:6], reverse=True)

        cells = page.locator("#cells button")
        cells.nth(0).click()
        cells.nth(5).click(modifiers=["Shift"])
        assert "one new class" in page.locator("#grid-note").inner_text()
        page.locator("#grid-name").fill("ant")
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") != "grid-name"
        page.get_by_role("button", name="Label 6 as a new class").click()
        wait_until(page, 2)
        assert len(files_below(tmp_path / "photos" / "ant")) == 6


def test_a_photograph_is_enlarged_and_keys_label_it_only_afterwards(
    keep, open_label_page, tmp_path
):
    keep(1)
    page = open_label_page()
    page.keyboard.press("z")
    width = "image => image.decode().then(() => image.clientWidth)"
    assert page.locator("#large").evaluate(width) > page.locator("#photo").evaluate(width)
    page.keyboard.press("1")
    page.keyboard.press("Escape")
    page.locator("#enlarged").wait_for(state="hidden")
    assert not (tmp_path / "photos").exists()
    page.locator("#zoom").click()
    page.get_by_role("button", name="Close").click()
    press(page, "1", 0)
    assert page.locator("#zoom").is_hidden()


def test_the_class_that_a_person_suggested_comes_first_but_is_no_label(
    keep, open_label_page, tmp_path
):
    keep(1, [1.0, 0.9, 0.8])
    keep(2, [9.0, 0.0, 0.0], reasons=("reported",), suggested="t-shirt")
    keep(3, [9.0, 0.0, 0.0], reasons=("reported",))
    page = open_label_page()
    shown = {}
    for left in (2, 1, 0):
        shown[page.evaluate("state.photograph.id")] = page.locator("#reported").text_content()
        names = page.locator("#classes .name").all_text_contents()
        assert names[0] == (
            "t-shirt" if "suggests" in page.locator("#reported").text_content() else "hat"
        )
        press(page, "s", left)
    del shown[identity(1)]  # nobody has reported it
    assert shown == {
        identity(2): "Reported as wrong. A person suggests: t-shirt",
        identity(3): "Reported as wrong. ",
    }
    assert page.locator("#reported").is_hidden()
    assert not (tmp_path / "photos").exists()


def test_wrong_labels_of_earlier_sessions_are_corrected(
    keep, open_label_page, open_folders, tmp_path
):
    for number in range(4):
        keep(number, [float(number), 1.0, 2.5])
    earlier = open_folders()
    for number in range(3):
        earlier.label(identity(number), "hat")
    page = open_label_page(viewport={"width": 390, "height": 844}, has_touch=True)
    page.locator("#as-labelled").tap()
    cells = page.locator("#labels button")
    cells.nth(2).wait_for()
    assert cells.all_text_contents() == ["hat"] * 3
    assert page.locator("#change").is_disabled()
    cells.nth(0).tap()
    cells.nth(2).tap()
    page.get_by_label("Right class").fill("a/b")
    page.get_by_role("button", name="Change 2 labels").tap()
    page.locator("#labelled-error", has_text="Leave out").or_(
        page.locator("#labelled-error", has_text="leave out")
    ).wait_for()
    cells.nth(0).tap()
    page.get_by_label("Right class").fill("a scarf")
    page.keyboard.press("Enter")
    page.locator("#labels bdi", has_text="a scarf").wait_for()
    assert cells.all_text_contents() == ["a scarf", "hat", "hat"]
    assert files_below(tmp_path / "photos" / "a scarf") == {f"{identity(2)}.jpg"}
    page.locator("#one-by-one").tap()
    page.locator("#classes .name", has_text="a scarf").wait_for()


def test_each_view_is_the_main_one_and_the_keyboard_keeps_its_place_in_it(
    half_sorted, open_page
):
    with label_server(half_sorted) as client:
        page = open_page(client.base_url, f"/?key={KEY}")
        page.wait_for_selector("#grid[aria-busy=false]", state="attached")
        for button in ("#as-grid", "#as-labelled", "#one-by-one"):
            page.locator(button).click()
            assert page.get_by_role("main").count() == 1  # of those that are visible

        held = []
        page.route("**/grids", lambda route: held.append(route))
        with page.expect_request("**/grids"):
            page.locator("#as-grid").click()
        chosen = page.locator("#kinds button").nth(1).text_content()
        page.locator("#kinds button").nth(1).focus()
        page.keyboard.press("Enter")
        focused, pressed = "document.activeElement.textContent", "#kinds [aria-pressed=true]"
        assert page.evaluate(focused) == page.locator(pressed).text_content() == chosen
        shown = page.locator(pressed).element_handle()
        while not held:
            page.wait_for_timeout(10)
        held[0].continue_()
        page.wait_for_function("button => !button.isConnected", arg=shown)
        assert page.evaluate(focused) == page.locator(pressed).text_content() == chosen

        page.locator("#one-by-one").click()
        page.locator("#classes button").first.focus()
        press(page, "Enter", 11)
        assert page.evaluate("document.activeElement.id") == "main"  # a space labels nothing


def test_several_photographs_get_one_label_by_mouse_and_by_keyboard(
    keep, open_label_page, tmp_path
):
    for number in range(30):
        keep(number, [float(number), 1.0, 2.5])
    page = open_label_page(viewport={"width": 390, "height": 844}, has_touch=True)
    order = page.evaluate("state.next")
    thumbnails = page.locator("#next button")
    assert thumbnails.count() == len(order) == 24
    fits = "document.scrollingElement.scrollHeight <= 844 && document.scrollingElement.scrollWidth <= 390"
    assert page.evaluate(fits)
    assert page.locator("#selection").text_content() == "Select several to label them together."
    thumbnails.nth(3).tap()
    thumbnails.nth(1).click(modifiers=["Shift"])  # 1 to 3
    thumbnails.nth(2).click()  # no longer
    thumbnails.nth(0).focus()
    for key in ("Tab", "Tab", "Tab", "Tab", "Space"):
        page.keyboard.press(key)
    assert [place for place, value in enumerate(pressed(page)) if value] == [1, 3, 4]
    assert page.locator("#selection").text_content().startswith("3 selected")
    assert page.evaluate(fits)
    assert page.locator("#photo").evaluate("image => image.clientHeight") > 0
    best = page.locator("#classes .name").first.text_content()
    press(page, "1", 27)
    labelled = {f"{best}/{order[place]}.jpg" for place in (1, 3, 4)}
    assert files_below(tmp_path / "photos") == labelled
    assert not any(pressed(page))
    assert page.evaluate("state.photograph.id") == order[0]
    press(page, "u", 28)
    press(page, "s", 27)  # without a selection, one
    thumbnails.nth(0).tap()
    page.keyboard.press("Escape")
    assert not any(pressed(page))


def test_of_several_labels_one_that_another_tab_took_leaves_the_others_selected(
    keep, open_label_page, tmp_path
):
    for number in range(4):
        keep(number)

    page, other = open_label_page(), open_label_page()
    taken = page.evaluate("state.next[1]")
    other.locator("#next button").nth(1).click()
    press(other, "1", 3)

    for place in range(3):
        page.locator("#next button").nth(place).click()

    press(page, "2", 2)
    assert "has a label already" in page.locator("#error").text_content()
    assert pressed(page) == [True, False]

    press(page, "2", 1)
    assert len(files_below(tmp_path / "photos")) == 3
    assert f"{LABELS[0]}/{taken}.jpg" in files_below(tmp_path / "photos")


def test_a_thumbnail_is_selected_by_what_it_shows_while_the_next_photograph_arrives(
    keep, open_label_page, monkeypatch
):
    monkeypatch.setattr(app, "MAX_THUMBNAILS", 1)
    held = []

    for number in range(2):
        keep(number)

    page = open_label_page()
    page.route("**/images/*", lambda route: held.append(route))

    with page.expect_request("**/images/*"):
        page.keyboard.press("1")

    page.locator("#next button").click()  # of the photograph that has a label now
    while not held:
        page.wait_for_timeout(10)

    held[0].continue_()
    wait_until(page, 1)
    assert pressed(page) == [False]


def test_the_sample_is_marked_and_held_out_and_names_with_markup_are_text(
    keep, open_label_page, tmp_path
):
    name = "<img src=x onerror=alert(1)>"
    keep(1, reasons=("sample",))
    keep(2, [3.0, 0.0], labels=[name, "hat"], known=False)
    page = open_label_page()
    assert page.locator("#decides").is_visible()
    assert page.locator("#unknown").is_hidden()
    press(page, "1", 1)
    assert files_below(tmp_path / "photos-held-out") == {f"hat/{identity(1)}-sample.jpg"}
    assert page.locator("#decides").is_hidden()
    assert page.locator("#unknown").is_visible()
    assert page.locator("#classes .name").first.text_content() == name
    page.keyboard.press("1")
    page.wait_for_selector("#error:not([hidden])")  # it cannot name a folder
    assert page.locator("#classes img, #error img").count() == 0
    assert not (tmp_path / "photos").exists()
