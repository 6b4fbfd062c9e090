"""The page and the docs of a server with API keys."""

import pytest

from sopdeploy_service.http.api_keys import new_key
from sopdeploy_service.settings import Settings
from tests.service.api.pages.conftest import give, operate, run_snippet, shown
from tests.support.service import running


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    return new_key(tmp_path_factory.getbasetemp() / "page-keys.toml", "person")


@pytest.fixture(scope="module")
def locked(bundle, onnx_runtime, key, tmp_path_factory):
    settings = Settings(keys=tmp_path_factory.getbasetemp() / "page-keys.toml")
    with running(onnx_runtime, bundle, settings) as client:
        yield client


def type_key(page, key):
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Use", exact=True).click()


def test_the_page_requests_a_key_which_survives_a_reload(
    open_page, locked, key, jpeg, tmp_path
):
    (tmp_path / "a.jpg").write_bytes(jpeg)
    page = open_page(locked.base_url)
    alert = page.get_by_role("alert")
    alert.wait_for()

    assert "requires a key" in alert.text_content()
    assert page.evaluate("document.activeElement.id") == "key"
    type_key(page, "sop_wrong\u00e4")
    page.get_by_text("the key is not valid").wait_for()
    type_key(page, key)
    page.locator("h1", has_text="tiny").wait_for()

    assert alert.is_hidden()
    page.reload()
    page.locator("h1", has_text="tiny").wait_for()
    give(page, jpeg)
    headers = {"Authorization": f"Bearer {key}"}
    classes = locked.post("/v1/classify", content=jpeg, headers=headers).json()["classes"]

    assert [label for label, _ in shown(page)] == [entry["label"] for entry in classes]
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert key not in page.content()

    for language in ("curl", "Python", "JavaScript"):
        code = page.locator(f"#code-{language} code").text_content()
        assert run_snippet(language, code, tmp_path, {"KEY": key}).startswith(
            ("{", classes[0]["label"])
        )

    other = page.context.new_page()
    other.goto(str(locked.base_url))
    other.get_by_role("alert").wait_for()


def test_the_docs_request_the_key_show_every_operation_and_send_requests(
    open_page, locked, key
):
    page = open_page(locked.base_url, "/docs")
    headers = {"x-api-key": key}
    page.get_by_text("this server requires a key").wait_for()
    type_key(page, key)
    page.locator(".opblock").first.wait_for()

    assert page.get_by_role("alert").text_content() == ""
    openapi = locked.get("/openapi.json", headers=headers).json()
    operations = {
        f"{verb.upper()} {path}" for path, verbs in openapi["paths"].items() for verb in verbs
    }
    shown = page.locator(".opblock").evaluate_all(
        "all => all.map(e => `${e.querySelector('.opblock-summary-method').textContent} "
        "${e.querySelector('.opblock-summary-path').dataset.path}`)"
    )

    assert set(shown) == operations
    with page.expect_response("**/info") as response:
        operate(page, "/info")
    assert response.value.json() == locked.get("/info", headers=headers).json()
