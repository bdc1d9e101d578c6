# One target per image: docker build --target router --tag asd-router:0.1.0 .
# Targets: router, policy, stage-onnx, tools.

FROM python:3.11-slim-bookworm AS build
RUN python -m venv /opt/asd
ENV PATH=/opt/asd/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY protos protos
COPY services services
COPY policy_service policy_service
COPY suites suites
COPY models models
RUN pip install .

FROM build AS build-policy
# The source tree itself, which has no version to pin.
# hadolint ignore=DL3013
RUN pip install ".[policy]"

FROM build AS build-stage-onnx
# The source tree itself, which has no version to pin.
# hadolint ignore=DL3013
RUN pip install ".[stage]"

FROM python:3.11-slim-bookworm AS base
# Kubernetes proves runAsNonRoot from a number only.
USER 10001:10001
ENV PATH=/opt/asd/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
WORKDIR /opt/asd

FROM base AS router
COPY --from=build /opt/asd /opt/asd
EXPOSE 50050
ENTRYPOINT ["python", "-m", "services.router"]

FROM base AS policy
COPY --from=build-policy /opt/asd /opt/asd
COPY policy_service/artifact /policy
EXPOSE 50051
ENTRYPOINT ["python", "-m", "policy_service"]

FROM base AS stage-onnx
COPY --from=build-stage-onnx /opt/asd /opt/asd
# What the stage derives from a model is kept here; the chart mounts a volume over it.
ENV ASD_CACHE_DIR=/tmp/cache
COPY models/small /models/small
COPY models/medium /models/medium
COPY models/large /models/large
EXPOSE 50061
ENTRYPOINT ["python", "-m", "services.stage"]

# The `asd` command: helm test and the benchmark Job run it.
FROM base AS tools
COPY --from=build /opt/asd /opt/asd
ENTRYPOINT ["asd"]
