# The server without torch: `docker build --target cpu .` or `--target gpu`. Both have one base and the same instructions; `gpu` adds
# ONNX Runtime for CUDA 13 with CUDA and cuDNN from NVIDIA's pip packages. The container toolkit of the host provides the driver.
# Tags move. For a repeatable build, select the base image by digest; docs/deploy.md describes how:
#   --build-arg PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

# --- build: the wheel of this project, and an empty environment; the images copy the environment only
FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
COPY deploy/lock/ lock/
COPY deploy/install_image.sh deploy/no_torch.py pyproject.toml README.md LICENSE ./
COPY sopdeploy/ sopdeploy/
COPY export/ export/
COPY service/ service/
COPY commands/ commands/
COPY examples/photos/ examples/photos/
# Everything after lock/build.txt is installed by the pip in it: that of the base image rejects extras in a file with hashes as
# soon as the index has a newer version of the package (https://github.com/pypa/pip/issues/12345).
# The secrets `pip` and `ca` are optional: a pip.conf and a certificate bundle for a private index.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -m venv tools && python3 -m venv --without-pip /opt/sopdeploy \
 && tools/bin/pip install --no-cache-dir --require-hashes --requirement lock/build.txt \
 && tools/bin/pip wheel --no-cache-dir --no-index --no-deps --no-build-isolation --wheel-dir dist .

FROM build AS cpu-build
# Further requirements, without hashes: --build-arg REQUIREMENTS="sopdeploy[openvino]", for example.
ARG REQUIREMENTS=
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    sh install_image.sh cpu ${REQUIREMENTS}

FROM build AS gpu-build
# Further requirements, without hashes: --build-arg REQUIREMENTS="sopdeploy[tensorrt]", for example, which downloads
# TensorRT from NVIDIA's own package index.
ARG REQUIREMENTS=
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt \
    sh install_image.sh gpu ${REQUIREMENTS}

# --- server: everything that the images have in common
FROM ${PYTHON_IMAGE} AS server
ARG VERSION=0.4.0
LABEL org.opencontainers.image.title="sopdeploy" \
      org.opencontainers.image.description="Train second-order image classifiers (DSoP, GSoP, GM-SOP), detach their auxiliary branches with proof, lower them to ONNX and TensorRT, and serve them with FastAPI." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
# The server writes to this folder only. With a volume or a tmpfs mounted here, the root file system may be read-only.
# No VOLUME: it would leave an anonymous volume behind with every `docker run`.
RUN mkdir -p /var/cache/sopdeploy && chown 10001:10001 /var/cache/sopdeploy
ENV PATH=/opt/sopdeploy/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/cache/sopdeploy \
    SOPDEPLOY_ENGINE_CACHE=/var/cache/sopdeploy/engines \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
COPY deploy/health.py /usr/local/lib/sopdeploy_health.py
USER 10001:10001
WORKDIR /
EXPOSE 8000
STOPSIGNAL SIGTERM
# A GPU server prepares every batch size before it is ready.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-I", "-S", "/usr/local/lib/sopdeploy_health.py"]
ENTRYPOINT ["sopdeploy"]
# /models is a bundle or a folder of bundles: of every project in it, the bundle exported last is served.
CMD ["serve", "/models", "--host", "*"]

FROM server AS cpu
COPY --from=cpu-build /opt/sopdeploy /opt/sopdeploy

FROM server AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=gpu-build /opt/sopdeploy /opt/sopdeploy
