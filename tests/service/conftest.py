"""The fixtures of the service's tests."""

from tests.support.service import (  # noqa: F401
    bundle,
    bundle_path,
    carded_bundle,
    carded_client,
    client,
    jpeg,
    onnx_runtime,
    pool,
    serve_with,
)
