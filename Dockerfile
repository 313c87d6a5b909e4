# This file has neither been built nor run: the machine that the project was made on has no container engine and no CUDA.
# tests/test_container.py checks what can be checked without: that what it copies exists, and that the lock fits pyproject.toml.
# Run by hand, with Python 3.11 on Debian 12, in an environment that holds the lock alone (torch from the wheel for CPU) and a folder
# that holds what is copied alone: `pip install --no-deps .`, `pidistill ls`, `preview`, two steps of `tiny/base`, `report`.
# Not tried: the base image, and torch from TORCH_INDEX.
#
# docker build -t pidistill --build-arg SETUPTOOLS_SCM_PRETEND_VERSION=1.2.3 .     (the version; git's tags are not copied)
# docker run --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" pidistill pidistill ls
#
# torch's wheels for CUDA bring the CUDA libraries with them, so that the base is plain Python; the driver is the host's, through the
# NVIDIA container toolkit. Another CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
ARG SETUPTOOLS_SCM_PRETEND_VERSION
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# Triton compiles small C files when it starts.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace
COPY requirements.lock ./
RUN pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements.lock)" && pip install -r requirements.lock

COPY pyproject.toml setup.py README.md LICENSE ./
COPY pidistill pidistill
COPY recipes recipes
COPY configs configs
COPY examples examples
RUN pip install --no-deps .

CMD ["pidistill", "ls"]
