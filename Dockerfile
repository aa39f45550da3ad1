# organseg on a GPU: docker build -t organseg .
# On a CPU:          docker build -t organseg --build-arg BASE_IMAGE=python:3.11-slim --build-arg TORCH=torch==2.13.0 .
#
# The base image has Python 3.11 and torch, or Python 3.11 alone and TORCH says what to install. Everything else comes
# from requirements.lock, by hash. Runs as any user, with a read-only root: what it writes goes to /work and to TMPDIR.
ARG BASE_IMAGE=pytorch/pytorch:2.13.0-cuda12.8-cudnn9-runtime

FROM ${BASE_IMAGE} AS build
ARG TORCH=""
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /build
RUN python -m venv --system-site-packages /opt/organseg
COPY requirements.lock ./
RUN if [ -n "${TORCH}" ]; then \
        /opt/organseg/bin/pip install ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "${TORCH}"; \
    fi \
    && /opt/organseg/bin/pip install --require-hashes --no-deps -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY organseg ./organseg
RUN /opt/organseg/bin/pip install --no-deps --no-build-isolation . \
    && /opt/organseg/bin/python -c "import torch, lightning, organseg"

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="organseg" \
      org.opencontainers.image.description="One multi-organ segmentation model from partially labelled CT data sets" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008 - Debian keeps one version of it at a time
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -m 1777 /work /scratch
COPY --from=build /opt/organseg /opt/organseg
COPY configs /opt/organseg/share/configs
# No home of an arbitrary user can be relied on: caches and temporary files go to /scratch, which can be a volume.
ENV PATH=/opt/organseg/bin:${PATH} \
    HOME=/scratch \
    TMPDIR=/scratch \
    MPLCONFIGDIR=/scratch/matplotlib \
    XDG_CACHE_HOME=/scratch/cache \
    WANDB_DIR=/scratch \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    LC_ALL=C.UTF-8
WORKDIR /work
USER 65532:0
ENTRYPOINT ["/usr/bin/tini", "-g", "--", "organseg"]
CMD ["--help"]
