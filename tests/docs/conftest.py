"""Chromium, as the pages of a server have it."""

from tests.service.api.pages.conftest import chromium, open_page  # noqa: F401  # fixtures
