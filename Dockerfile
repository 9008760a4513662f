# Two images from one slim base:
#   docker build --target cpu -t fcn-segment:cpu .
#   docker build --target gpu -t fcn-segment:gpu .
# The CUDA libraries of the gpu target come from Python packages, so it needs no CUDA base image; its
# host needs NVIDIA's driver and container toolkit.
#
# The base is pinned by tag. Pin it by digest too where a registry can be asked for one:
#   --build-arg PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

# ---- build: fills /opt/venv and /app, nothing else of it is kept ----------------------------------
FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/venv
WORKDIR /app

# The packages come first: they change less often than the code. Of the code only the serving half
# goes into the image. It is installed in place, so that /app is laid out like the checkout and the
# default model is where the service looks for it.
FROM build AS build-cpu
COPY requirements-cpu.txt ./
RUN pip --python /opt/venv/bin/python install --require-hashes --only-binary :all: \
        -r requirements-cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY service service
RUN pip --python /opt/venv/bin/python install --no-deps --no-build-isolation --editable . \
    && pip --python /opt/venv/bin/python uninstall --yes setuptools \
    && python -m compileall -q service

FROM build AS build-gpu
COPY requirements-gpu.txt ./
RUN pip --python /opt/venv/bin/python install --require-hashes --only-binary :all: \
        -r requirements-gpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY service service
RUN pip --python /opt/venv/bin/python install --no-deps --no-build-isolation --editable . \
    && pip --python /opt/venv/bin/python uninstall --yes setuptools \
    && python -m compileall -q service

# ---- run: what both images share -----------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS run
# pip is of no use in a container whose root is read-only.
RUN python -m pip uninstall --yes --root-user-action=ignore pip \
    && useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin fcn
WORKDIR /app
# Nothing is written under /app or /opt; libraries that insist on a home get the tmpfs.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FCN_HOST=0.0.0.0 \
    FCN_PORT=8000 \
    FCN_LOG_FORMAT=json
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "/app/docker/healthcheck.py"]
# Exec form: the service is process 1 and gets SIGTERM itself.
ENTRYPOINT ["fcn-segment"]
CMD ["serve"]

FROM run AS gpu
COPY --from=build-gpu /opt/venv /opt/venv
COPY models/artifacts models/artifacts
COPY docker/healthcheck.py docker/healthcheck.py
COPY --from=build-gpu /app/service service
ENV FCN_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

# Last, so that a plain `docker build .` makes the image that runs anywhere.
FROM run AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
COPY models/artifacts models/artifacts
COPY docker/healthcheck.py docker/healthcheck.py
COPY --from=build-cpu /app/service service
ENV FCN_DEVICE=cpu
USER 10001:10001
