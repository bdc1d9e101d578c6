# One target per image: docker build --target router --tag asd-router:0.1.0 .
# Targets: router, gateway, policy, manager, stage-onnx, stage-vllm, stage-tensorrt-llm, tools, train.

# The images that others start from are named by tag: whoever builds gets the fixes that a registry publishes under it,
# and perhaps another image each time. Where a build must give the same image again, pin each by the digest that the
# registry gives (`docker buildx imagetools inspect IMAGE`); a tag beside a digest is for readers only:
#   docker build --target router --build-arg PYTHON_IMAGE=docker.io/library/python:3.11.14-slim-bookworm@sha256:... .
#   docker build --target stage-vllm --build-arg VLLM_IMAGE=docker.io/vllm/vllm-openai:v0.25.1@sha256:... .
#   docker build --target stage-tensorrt-llm \
#     --build-arg TENSORRT_LLM_IMAGE=nvcr.io/nvidia/tensorrt-llm/release:1.3.0rc24@sha256:... .

# What all other images start from: Debian's Python 3.11 or later.
ARG PYTHON_IMAGE=docker.io/library/python:3.11.14-slim-bookworm
# What the GPU stages start from: images that hold the library, its CUDA and the compiler that it calls. The
# engines' calls are checked against these versions (docs/engines.md).
ARG VLLM_IMAGE=docker.io/vllm/vllm-openai:v0.25.1
ARG TENSORRT_LLM_IMAGE=nvcr.io/nvidia/tensorrt-llm/release:1.3.0rc24

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS build
# For tools/slim_packages.py; Debian keeps one version only, so that a pinned one would be gone.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*
# Neither pip nor setuptools goes into the images: the base's pip installs there.
RUN python -m venv --without-pip /opt/asd
ENV PIP_PYTHON=/opt/asd/bin/python PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY clients/python clients/python
COPY services services
COPY policy_service/*.py policy_service/
COPY policy_service/train policy_service/train
COPY suites suites
# Neither models nor policy: each image takes the files that it serves, below.
COPY models/__init__.py models/
COPY tools/slim_packages.py tools/
RUN pip install ./clients/python . && python tools/slim_packages.py /opt/asd

FROM build AS build-gateway
# The source tree itself, which has no version to pin.
# hadolint ignore=DL3013
RUN pip install ./clients/python ".[gateway]" && python tools/slim_packages.py /opt/asd

FROM build AS build-policy
# The source tree itself, which has no version to pin.
# hadolint ignore=DL3013
RUN pip install ./clients/python ".[policy]" && python tools/slim_packages.py /opt/asd

FROM build AS build-manager
# The source tree itself, which has no version to pin.
# hadolint ignore=DL3013
RUN pip install ./clients/python ".[kubernetes]" && python tools/slim_packages.py /opt/asd

FROM build AS build-stage-onnx
# The source tree itself, which has no version to pin.
# hadolint ignore=DL3013
RUN pip install ./clients/python ".[stage]" && python tools/slim_packages.py /opt/asd

FROM build AS build-tools
# The source tree itself, which has no version to pin.
# hadolint ignore=DL3013
RUN pip install ./clients/python ".[hub]" && python tools/slim_packages.py /opt/asd

FROM build AS build-train
# The source tree itself, which has no version to pin.
# hadolint ignore=DL3013
RUN pip install ./clients/python ".[policy-train]" && python tools/slim_packages.py /opt/asd

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS base
# The base comes without the standard library's compiled files, and a read-only root keeps none: every start would
# compile what it imports, as long again as the start itself takes (0.7 s of CPU for the router, 0.3 s with them).
RUN python -m compileall -q -x '/(site-packages|test|tests|idlelib|ensurepip|lib2to3|pydoc_data|turtledemo|tkinter)/' \
    "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
# Kubernetes proves runAsNonRoot from a number only.
USER 10001:10001
ENV PATH=/opt/asd/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
# No library reports its use to its makers (services/common/privacy.py).
ENV ORT_DISABLE_TELEMETRY=1 HF_HUB_DISABLE_TELEMETRY=1 \
    VLLM_NO_USAGE_STATS=1 TRTLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
WORKDIR /opt/asd

FROM base AS router
COPY --from=build /opt/asd /opt/asd
EXPOSE 50050
ENTRYPOINT ["python", "-m", "services.router"]

FROM base AS gateway
COPY --from=build-gateway /opt/asd /opt/asd
EXPOSE 8000
ENTRYPOINT ["python", "-m", "services.gateway"]

FROM base AS policy
COPY --from=build-policy /opt/asd /opt/asd
COPY policy_service/policy.zip /policy/
EXPOSE 50051
ENTRYPOINT ["python", "-m", "policy_service"]

FROM base AS manager
COPY --from=build-manager /opt/asd /opt/asd
EXPOSE 50053
ENTRYPOINT ["python", "-m", "services.scaler"]

FROM base AS stage-onnx
COPY --from=build-stage-onnx /opt/asd /opt/asd
# What the stage derives from a model is kept here; the chart mounts a volume over it.
ENV ASD_CACHE_DIR=/tmp/cache
COPY models/small /models/small
COPY models/medium /models/medium
COPY models/large /models/large
EXPOSE 50061
ENTRYPOINT ["python", "-m", "services.stage"]

# hadolint ignore=DL3006
FROM ${VLLM_IMAGE} AS stage-vllm
# Into the image's own Python, and only what is missing: its packages stay as its makers tested them.
# hadolint ignore=DL3013
RUN --mount=type=bind,target=/src,rw \
    python3 -m pip install --no-cache-dir --break-system-packages /src/clients/python "/src[vllm]"
USER 10001:10001
# The root is read-only and the user has no name: everything that is compiled or cached goes to /tmp, which is
# a volume.
ENV HOME=/tmp USER=asd LOGNAME=asd PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    ASD_CACHE_DIR=/tmp/cache VLLM_CACHE_ROOT=/tmp/vllm TRITON_CACHE_DIR=/tmp/triton \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor HF_HOME=/tmp/huggingface \
    HF_HUB_OFFLINE=1 VLLM_USE_FLASHINFER_SAMPLER=0
ENV ORT_DISABLE_TELEMETRY=1 HF_HUB_DISABLE_TELEMETRY=1 \
    VLLM_NO_USAGE_STATS=1 TRTLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
WORKDIR /opt/asd
EXPOSE 50061
ENTRYPOINT ["python3", "-m", "services.stage"]

# hadolint ignore=DL3006
FROM ${TENSORRT_LLM_IMAGE} AS stage-tensorrt-llm
# hadolint ignore=DL3013
RUN --mount=type=bind,target=/src,rw \
    python3 -m pip install --no-cache-dir --break-system-packages /src/clients/python "/src[tensorrt-llm]"
USER 10001:10001
ENV HOME=/tmp USER=asd LOGNAME=asd PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    ASD_CACHE_DIR=/tmp/cache TRITON_CACHE_DIR=/tmp/triton TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    HF_HOME=/tmp/huggingface HF_HUB_OFFLINE=1
ENV ORT_DISABLE_TELEMETRY=1 HF_HUB_DISABLE_TELEMETRY=1 \
    VLLM_NO_USAGE_STATS=1 TRTLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
WORKDIR /opt/asd
EXPOSE 50061
ENTRYPOINT ["python3", "-m", "services.stage"]

# The `asd` command: helm test and the benchmark Job run it.
FROM base AS tools
COPY --from=build-tools /opt/asd /opt/asd
ENTRYPOINT ["asd"]

# The `asd-policy` command: the Jobs that collect outcomes and fit a policy run it.
FROM base AS train
COPY --from=build-train /opt/asd /opt/asd
ENTRYPOINT ["asd-policy"]
