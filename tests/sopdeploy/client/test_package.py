"""The imports of the client package."""

import subprocess
import sys


def test_the_client_imports_neither_the_server_nor_torch():
    heavy = ("torch", "onnx", "onnxruntime", "fastapi", "uvicorn", "sopdeploy_service")
    code = f"import sys, sopdeploy.client; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
