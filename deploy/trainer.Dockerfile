FROM python:3.11-slim
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NUMBA_CACHE_DIR=/tmp/numba MPLCONFIGDIR=/tmp/matplotlib OMP_WAIT_POLICY=PASSIVE
WORKDIR /app
COPY constraints.txt ./
# PyTorch's own index has a folder of wheels for each platform: cpu, or a CUDA version such as cu130. Without an
# index pip takes torch from where it takes the rest.
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl
# the largest wheel in a layer of its own: it changes least
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX/$TORCH} torch
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY npu_wire npu_wire
COPY npu_server npu_server
COPY trainer_client trainer_client
RUN pip install -c constraints.txt '.[trainer]' && install -d -o 10001 -g 10001 /runs
USER 10001:10001
WORKDIR /runs
VOLUME /runs
ENTRYPOINT ["npu-trainer"]
CMD ["compare"]
