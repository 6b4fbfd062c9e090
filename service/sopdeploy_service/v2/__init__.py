"""The Open Inference Protocol, version 2, over HTTP, with Triton's extensions that clients rely on."""
