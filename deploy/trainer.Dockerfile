FROM python:3.11-slim
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NUMBA_CACHE_DIR=/tmp/numba MPLCONFIGDIR=/tmp/matplotlib OMP_WAIT_POLICY=PASSIVE
WORKDIR /app
COPY constraints.txt ./
# the largest wheel in a layer of its own: it changes least
RUN pip install -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY npu_wire npu_wire
COPY npu_server npu_server
COPY trainer_client trainer_client
RUN pip install -c constraints.txt '.[trainer]' && install -d -o 10001 -g 10001 /runs
USER 10001:10001
WORKDIR /runs
VOLUME /runs
ENTRYPOINT ["npu-trainer"]
CMD ["compare"]
