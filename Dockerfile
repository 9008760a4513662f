# Two images from one slim base:
#   docker build --target cpu -t fcn-segment:cpu .
#   docker build --target gpu -t fcn-segment:gpu .
# The gpu target gets the CUDA libraries from Python packages, so it needs no CUDA base image. Its host
# needs NVIDIA's driver and container toolkit.
#
# The base is pinned by tag. To pin it by digest too:
#   --build-arg PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

# ---- packages: fills /opt/venv, the only part that is kept ---------------------------------------
FROM ${PYTHON_IMAGE} AS packages
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_PYTHON=/opt/venv/bin/python \
    PIP_REQUIRE_HASHES=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /packages
RUN python -m venv --without-pip /opt/venv

# setuptools is in the lock files only to install the project, which the images do not do.
FROM packages AS packages-cpu
COPY requirements/cpu.txt ./
RUN pip install -r cpu.txt && pip uninstall --yes setuptools

FROM packages AS packages-gpu
COPY requirements/gpu.txt ./
RUN pip install -r gpu.txt && pip uninstall --yes setuptools

# ---- files: the serving half and its model, laid out like the checkout ---------------------------
FROM ${PYTHON_IMAGE} AS files
WORKDIR /app
COPY LICENSE ./
COPY models/artifacts models/artifacts
COPY docker/healthcheck.py docker/healthcheck.py
COPY service service
# Readable by all users, whatever the checkout's umask. The root is read-only, so Python need not
# compare the compiled code with its source.
RUN chmod -R a+rX . && python -m compileall -q --invalidation-mode unchecked-hash service

# ---- run: shared by both images ------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS run
# pip is useless in a container with a read-only root. A named volume mounted at the cache's folder
# gets the folder's owner.
RUN python -m pip uninstall --yes --root-user-action=ignore pip \
    && useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin fcn \
    && install --directory --owner=fcn --group=fcn /var/cache/fcn-segment
WORKDIR /app
# Nothing is written under /app or /opt; libraries that need a home use the tmpfs. ONNX Runtime's
# wheels report to Microsoft by default.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    FCN_HOST=0.0.0.0 \
    FCN_PORT=8000 \
    FCN_LOG_FORMAT=json \
    ORT_DISABLE_TELEMETRY=1
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "/app/docker/healthcheck.py"]
# Exec form, so that the service gets SIGTERM instead of a shell.
ENTRYPOINT ["python", "-m", "service"]
CMD ["serve"]
COPY --from=files /app/LICENSE ./
COPY --from=files /app/models models
COPY --from=files /app/docker docker

# The packages come before the code, because they change less often.
FROM run AS gpu
COPY --from=packages-gpu /opt/venv /opt/venv
COPY --from=files /app/service service
ENV FCN_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

# Last, so that a plain `docker build .` builds the image that runs anywhere.
FROM run AS cpu
COPY --from=packages-cpu /opt/venv /opt/venv
COPY --from=files /app/service service
ENV FCN_DEVICE=cpu
USER 10001:10001
