# One image for every process; docker-compose.yml says which is which.
# Packages come from where pip's own configuration says: give PIP_INDEX_URL as a build argument to use a mirror.

FROM python:3.13-slim-bookworm AS packages
ARG PIP_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv
# The GPU worker's image takes others, with a CUDA build of torch.
ARG LOCKS=requirements.lock
COPY requirements.lock requirements-gpu.lock requirements-cuda.lock ./
# Compiled here, since the file system is read-only where it runs.
RUN /opt/venv/bin/pip install --require-hashes $(printf -- '-r %s ' $LOCKS)

FROM python:3.13-slim-bookworm
# A number, so that an orchestrator can see that it is not root.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin darkroom \
    && install -d -m 0700 -o 10001 -g 10001 /var/lib/darkroom /var/spool/darkroom
COPY --from=packages /opt/venv /opt/venv
WORKDIR /srv/darkroom
COPY . .
RUN /opt/venv/bin/python -m compileall -q .
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DARKROOM_DATA_DIR=/var/lib/darkroom \
    DARKROOM_SPOOL=/var/spool/darkroom \
    HF_HOME=/var/lib/darkroom/hub \
    BIND=0.0.0.0 \
    PORT=8000
USER 10001:10001
EXPOSE 8000
# The Procfile's `api`; the other processes give their own command.
CMD ["sh", "-c", "exec gunicorn -c api/gunicorn.conf.py --bind ${BIND:-127.0.0.1}:${PORT:-8000} \"api.app:create_app()\""]
