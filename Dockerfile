# docs/docker.md says how to build and use this image.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

# Address of an index with other wheels of torch, such as PyTorch's for CPUs; empty: those that use NVIDIA GPUs.
ARG TORCH_INDEX=""
ARG EXTRAS="hub,tensorboard,trackio"

ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/ghibli \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /app
COPY pyproject.toml README.md ./
COPY locks/extras.txt locks/
COPY ghibli/__init__.py ghibli/
# The packages first, so that a change of the code does not install them again; in the versions that are tested.
RUN sed -e '/--hash/d' -e 's/ \\$//' locks/extras.txt > /tmp/pins.txt \
    && python3 -m venv /opt/venv \
    && pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint /tmp/pins.txt --editable ".[$EXTRAS]" \
    && rm /tmp/pins.txt

COPY . .
# Whoever runs the container writes here: runs, paths noted by `ghibli prepare`, downloaded models, images.
RUN useradd --uid 1000 --create-home --home-dir /home/ghibli ghibli \
    && mkdir -p outputs conf/local data /home/ghibli/.cache \
    && chown -R ghibli:ghibli outputs conf/local data /home/ghibli \
    && chmod -R a+rwX outputs conf/local data /home/ghibli

USER 1000
VOLUME ["/app/outputs", "/app/conf/local", "/app/data", "/home/ghibli/.cache"]
ENTRYPOINT ["/app/docker/entrypoint"]
CMD ["--help"]
