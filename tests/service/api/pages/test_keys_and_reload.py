"""Pages of a server with API keys, and of a server that reloads its bundle."""

import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy_service.http.api_keys import new_key
from sopdeploy_service.settings import Settings
from tests.service.api.pages.conftest import done, give, operate, shown

pytestmark = pytest.mark.browser


@pytest.fixture
def key(tmp_path):
    return new_key(tmp_path / "keys.toml", "person")


@pytest.fixture
def locked(serve_with, onnx_runtime, key, tmp_path):
    return serve_with(onnx_runtime, keys=tmp_path / "keys.toml")


def type_key(page, key):
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Use").click()


def test_the_page_requests_a_key_and_works_with_it(open_page, locked, key, jpeg):
    page = open_page(locked.base_url)
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "this server requires a key; enter it above." in alert.text_content()
    assert page.evaluate("document.activeElement.id") == "key"
    type_key(page, "sop_wrong\u00e4")
    page.get_by_text("the key is not valid").wait_for()
    type_key(page, key)
    page.locator("h1", has_text="tiny").wait_for()
    assert alert.is_hidden()
    give(page, jpeg)
    headers = {"Authorization": f"Bearer {key}"}
    classes = locked.post("/v1/classify", content=jpeg, headers=headers).json()["classes"]
    assert [label for label, _ in shown(page)] == [entry["label"] for entry in classes]


def test_the_key_survives_a_reload_but_not_the_tab(open_page, locked, key):
    page = open_page(locked.base_url)
    page.get_by_role("alert").wait_for()
    type_key(page, key)
    page.locator("h1", has_text="tiny").wait_for()
    page.reload()
    page.locator("h1", has_text="tiny").wait_for()
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert key not in page.content()
    other = page.context.new_page()
    other.goto(str(locked.base_url))
    other.get_by_role("alert").wait_for()


def test_the_docs_request_the_key_too(open_page, locked, key):
    page = open_page(locked.base_url, "/docs")
    page.get_by_text("this server requires a key").wait_for()
    type_key(page, key)
    page.locator(".opblock").first.wait_for()
    assert page.get_by_role("alert").text_content() == ""
    with page.expect_response("**/info") as response:
        operate(page, "/info")
    assert response.value.status == 200


def test_a_swapped_model_is_detected_and_shown(
    open_page, run_server, onnx_runtime, make_bundle, tmp_path, jpeg
):
    first, second = make_bundle(tmp_path, probes=3), make_bundle(tmp_path, probes=4)
    with run_server(onnx_runtime, open_bundle(first), Settings(threads=1)) as client:
        page = open_page(client.base_url)
        page.locator("#bundle", has_text=first.name).wait_for()
        give(page, jpeg)
        before = shown(page)
        client.reload(second)
        page.evaluate("void askAll()")
        page.locator("#bundle", has_text=second.name).wait_for()
        done(page)
        assert shown(page) == before
        assert page.get_by_role("alert").is_hidden()
