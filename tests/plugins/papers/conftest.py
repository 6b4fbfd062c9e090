"""The fixtures of the papers' tests: torch on one thread."""

from tests.sopdeploy.conftest import few_digits, one_thread  # noqa: F401
