# organseg on a GPU: docker build -t organseg .
# On a CPU:          docker build -t organseg --build-arg BASE_IMAGE=python:3.11-slim --build-arg TORCH=torch==2.13.0 .
#
# The base image is a Debian or Ubuntu with Python 3.11 or 3.12, pip and torch. Where it has no torch, TORCH says what
# to install, and TORCH_INDEX from which index if not from PyPI, whose torch is made for CUDA. Everything else comes
# from requirements.lock, by hash. The image runs as any user, with a read-only root and without a network: what it
# writes goes to /work and /scratch, to be volumes. `python tools/image.py` does all this without a container engine.
ARG BASE_IMAGE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime@sha256:db80a41f8428644cebcb3d75b0b62df334ab6c0e75785951eb25f48bfbd42407

FROM ${BASE_IMAGE} AS build
ARG TORCH=""
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
# Without a pip of its own: what makes one is a package apart on Ubuntu, and the base image's pip does the same.
RUN python -m venv --without-pip --system-site-packages /opt/organseg
COPY requirements.lock ./
# --ignore-installed: a package that the base image happens to have was not checked against its hash.
RUN /opt/organseg/bin/python -m pip install --require-hashes --no-deps --only-binary=:all: --ignore-installed \
        -r requirements.lock \
    && if [ -n "${TORCH}" ]; then \
        /opt/organseg/bin/python -m pip install ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "${TORCH}"; \
    fi
COPY pyproject.toml README.md LICENSE ./
COPY organseg ./organseg
COPY configs ./configs
# --no-index: by now all that organseg asks for must be there, torch as well. -m 644: a checkout may be private.
RUN /opt/organseg/bin/python -m pip install --no-index --no-build-isolation ".[tensorboard,wandb]" \
    && find configs -name "*.yaml" -exec install -D -m 644 {} /opt/organseg/share/{} \; \
    && /opt/organseg/bin/python -I -c "import torch, lightning, organseg"

FROM ${BASE_IMAGE}
ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="organseg" \
      org.opencontainers.image.description="One multi-organ segmentation model from partially labelled CT data sets" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.licenses="Apache-2.0"
# Distributions keep one version of tini at a time, so there is none to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log \
    && install -d -m 1777 /work /scratch
COPY --from=build /opt/organseg /opt/organseg
# No home of an arbitrary user can be relied on: caches and temporary files go to /scratch.
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
