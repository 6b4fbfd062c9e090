"""The label page in a real browser: keys, touch, undo, new classes, reload, and names with markup."""

import pytest

from tests.service.labelling.conftest import KEY, LABELS, files_below, identity, label_server

pytestmark = pytest.mark.browser


@pytest.fixture
def open_label_page(open_page, open_folders):
    """`open_label_page(**traits)` starts a server and opens its page."""
    with label_server(open_folders()) as client:

        def open_one(**traits):
            page = open_page(client.base_url, f"/?key={KEY}", **traits)
            page.wait_for_selector("#classes li, #empty:not([hidden])")
            return page

        yield open_one


def press(page, key: str, left: int) -> None:
    """Press *key* and wait until *left* photographs are left."""
    page.keyboard.press(key)
    wait_until(page, left)


def wait_until(page, left: int) -> None:
    page.locator("#progress", has_text=f", {left} left").wait_for()
    page.locator("#main[aria-busy=false]").wait_for()


def test_keys_label_skip_and_undo_and_a_reload_goes_on(keep, open_label_page, tmp_path):
    for number in range(6):
        keep(number, [float(number), 1.0, 2.5], known=False if number == 0 else None)
    page = open_label_page()
    shown = []

    def identity_shown() -> str:
        shown.append(page.evaluate("state.photograph.id"))
        return shown[-1]

    first = identity_shown()
    assert page.locator("#photo").evaluate("image => image.complete && image.naturalWidth > 0")
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
    assert page.locator("#progress").text_content() == "1 done in this session, 5 left"
    for left in range(4, -1, -1):
        press(page, "2", left)
    assert page.locator("#empty").is_visible()
    assert page.locator("#photo").is_hidden()
    assert len(files_below(tmp_path / "photos")) == 6
    page.keyboard.press("1")
    assert page.locator("#error").is_hidden()


def test_a_new_class_is_typed_after_its_key_and_offered_from_then_on(keep, open_label_page, tmp_path):
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
    assert "leave out control characters" in page.locator("#error").text_content()
    assert page.locator("#name").input_value() == "../hat"  # to correct it


def test_names_with_markup_are_shown_as_text(keep, open_label_page, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    keep(1, [3.0, 0.0], labels=[name, "hat"])
    page = open_label_page()
    assert page.locator("#classes .name").first.text_content() == name
    assert page.locator("#classes img").count() == 0
    page.keyboard.press("1")
    page.wait_for_selector("#error:not([hidden])")  # it cannot name a folder
    assert page.locator("#error img").count() == 0
    assert not (tmp_path / "photos").exists()


def test_the_uniform_sample_is_marked_and_held_out(keep, open_label_page, tmp_path):
    keep(1, reasons=("sample",))
    keep(2, known=False)
    page = open_label_page()
    assert page.locator("#sampled").is_visible()
    assert page.locator("#unknown").is_hidden()
    press(page, "1", 1)
    assert files_below(tmp_path / "photos-held-out") == {f"hat/{identity(1)}.jpg"}
    assert page.locator("#sampled").is_hidden()
    assert page.locator("#unknown").is_visible()
