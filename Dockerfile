# The server without torch: `docker build --target cpu .`, or `--target gpu` for ONNX Runtime on CUDA 13.
# Tags move. For a repeatable build, select the base image by digest; docs/deploy.md describes how:
#   --build-arg PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

# --- cpu: install all packages in this stage; the next stage copies the result only
FROM ${PYTHON_IMAGE} AS cpu-build
WORKDIR /build
COPY deploy/lock/ lock/
COPY deploy/no_torch.py pyproject.toml README.md LICENSE ./
COPY sopdeploy/ sopdeploy/
COPY export/ export/
COPY service/ service/
# The secrets `pip` and `ca` are optional: a pip.conf and a certificate bundle for a private index.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -m venv tools && python3 -m venv --without-pip /opt/sopdeploy \
 && tools/bin/pip install --no-cache-dir --require-hashes --requirement lock/build.txt \
 && tools/bin/pip --python /opt/sopdeploy/bin/python install --no-cache-dir --require-hashes --requirement lock/cpu.txt \
 && tools/bin/pip wheel --no-cache-dir --no-index --no-deps --no-build-isolation --wheel-dir dist . \
 && tools/bin/pip --python /opt/sopdeploy/bin/python install --no-cache-dir --no-index --no-deps dist/*.whl \
 && /opt/sopdeploy/bin/python no_torch.py

FROM ${PYTHON_IMAGE} AS cpu
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="sopdeploy" \
      org.opencontainers.image.description="Serves second-order-pooling image classifiers over HTTP, on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
COPY --from=cpu-build /opt/sopdeploy /opt/sopdeploy
# The server writes to this folder only. With a volume mounted here, the root file system may be read-only.
RUN mkdir -p /var/cache/sopdeploy && chown 10001:10001 /var/cache/sopdeploy
ENV PATH=/opt/sopdeploy/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/cache/sopdeploy \
    SOPDEPLOY_ENGINE_CACHE=/var/cache/sopdeploy/engines \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
VOLUME /var/cache/sopdeploy
USER 10001:10001
WORKDIR /
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["sopdeploy", "health"]
ENTRYPOINT ["sopdeploy"]
CMD ["serve", "/models", "--host", "0.0.0.0"]

# --- gpu: the same on NVIDIA's image, which contains CUDA and cuDNN but no Python
FROM ${CUDA_IMAGE} AS gpu-base
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

FROM gpu-base AS gpu-build
WORKDIR /build
COPY deploy/lock/ lock/
COPY deploy/no_torch.py pyproject.toml README.md LICENSE ./
COPY sopdeploy/ sopdeploy/
COPY export/ export/
COPY service/ service/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -m venv tools && python3 -m venv --without-pip /opt/sopdeploy \
 && tools/bin/pip install --no-cache-dir --require-hashes --requirement lock/build.txt \
 && tools/bin/pip --python /opt/sopdeploy/bin/python install --no-cache-dir --require-hashes --requirement lock/gpu.txt \
 && tools/bin/pip wheel --no-cache-dir --no-index --no-deps --no-build-isolation --wheel-dir dist . \
 && tools/bin/pip --python /opt/sopdeploy/bin/python install --no-cache-dir --no-index --no-deps dist/*.whl \
 && /opt/sopdeploy/bin/python no_torch.py

FROM gpu-base AS gpu
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="sopdeploy" \
      org.opencontainers.image.description="Serves second-order-pooling image classifiers over HTTP, on GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
COPY --from=gpu-build /opt/sopdeploy /opt/sopdeploy
RUN mkdir -p /var/cache/sopdeploy && chown 10001:10001 /var/cache/sopdeploy
ENV PATH=/opt/sopdeploy/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/cache/sopdeploy \
    SOPDEPLOY_ENGINE_CACHE=/var/cache/sopdeploy/engines \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
VOLUME /var/cache/sopdeploy
USER 10001:10001
WORKDIR /
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["sopdeploy", "health"]
ENTRYPOINT ["sopdeploy"]
CMD ["serve", "/models", "--host", "0.0.0.0"]
