# Threadgraph with its own PostgreSQL under /data:
#   docker build --tag threadgraph .
#   docker run --publish 127.0.0.1:8000:8000 --volume threadgraph:/data --stop-timeout 30 threadgraph
# With a PostgreSQL beside it: compose.yaml.

# The Python that CI tests with.
FROM python:3.11.17-slim-trixie AS base

FROM base AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
COPY requirements/run.lock /build/run.lock
# Wheels only: the image has no compiler, and nothing but Python is run to install them.
RUN python -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --require-hashes --only-binary=:all: --requirement /build/run.lock
WORKDIR /app
COPY config.py schema.graphql threadgraph ./
COPY graph graph
COPY models models
COPY providers providers
COPY resolvers resolvers
COPY server server
COPY services services
COPY storage storage
COPY streams streams
COPY web/dist web/dist
# A checkout made under a strict umask must be readable too; byte code, because the user cannot write any.
RUN chmod -R u=rwX,go=rX . \
    && /opt/venv/bin/python -m compileall -q .

FROM base
# An init: it reaps a PostgreSQL that died, and lets SIGTERM through while Python is still starting.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
# A named user, not just a number: PostgreSQL looks its name up.
RUN groupadd --gid 10001 threadgraph \
    && useradd --uid 10001 --gid threadgraph --no-log-init --no-create-home --home-dir /data \
        --shell /usr/sbin/nologin threadgraph \
    && install --directory --owner=threadgraph --group=threadgraph --mode=0700 /data
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /app /app
# For `docker exec`: threadgraph backfill, threadgraph seed.
RUN ln -s /app/threadgraph /usr/local/bin/threadgraph
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0 \
    PORT=8000 \
    DATA_DIR=/data
WORKDIR /app
VOLUME ["/data"]
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# http.client, because urllib would ask a proxy that the environment names.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PORT') or 8000), timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "server"]
