"""Images that show none of the classes, in a real browser: the banner, its score, and nothing left behind."""

from dataclasses import replace

import numpy as np
import pytest
from fake_runtime import FakeRuntime

from sopdeploy.decision import Decision, Rejection
from sopdeploy_service.settings import Settings
from tests.service.api.pages.conftest import give, shown
from tests.service.conftest import picture_bytes, running

pytestmark = pytest.mark.browser

BRIGHT, DARK = (picture_bytes((value, value, value)) for value in (250, 60))


class ContrastRuntime(FakeRuntime):
    """Logits whose spread is the mean of the image over 10, so that dark images have a low score."""

    def run(self, images):
        spread = images.mean(axis=(1, 2, 3), dtype=np.float32) / 10
        return {"logits": np.linspace(0, 1, 7, dtype=np.float32) * spread[:, None]}


def with_decision(bundle, decision: Decision):
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"decision": decision}))


def test_the_banner_with_the_score_is_shown_for_unknown_images_only(open_page, bundle) -> None:
    rule = Decision(rejection=Rejection(score="max_probability", threshold=0.7))
    with running(ContrastRuntime(num_classes=7), with_decision(bundle, rule), Settings()) as client:
        found = [client.post("/v1/classify", content=body).json() for body in (BRIGHT, DARK)]
        assert [one["known"] for one in found] == [True, False]
        page = open_page(client.base_url)
        banner, status = page.locator("#unknown"), page.get_by_role("status")
        for body, answer in ((BRIGHT, found[0]), (DARK, found[1]), (BRIGHT, found[0])):
            give(page, body)
            assert banner.is_visible() is not answer["known"]
            assert page.locator("#score").inner_text().split() == [
                *("Score", f"{answer['score']:.3f}", "unknown", "known", "from", "0.700")
            ]
            assert status.text_content().startswith("Probably none of the classes. ") is not answer["known"]
            if not answer["known"]:
                assert banner.text_content().startswith("Unknown.")
                assert f"its score {answer['score']:.3f} is below" in banner.text_content()
            assert shown(page)[0][0] == answer["classes"][0]["label"]
        give(page, DARK)
        give(page, b"no picture", name="notes.txt", type="text/plain")
        assert banner.is_hidden()
