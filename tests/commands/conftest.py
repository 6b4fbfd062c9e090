"""The fixtures of the commands' tests: a bundle, a runtime, and torch on one thread."""

from tests.sopdeploy.conftest import few_digits, one_thread  # noqa: F401
from tests.support.service import bundle, bundle_path, client, jpeg, onnx_runtime  # noqa: F401
