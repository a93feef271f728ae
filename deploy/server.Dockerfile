# The compiler stays behind: only the wheel, with the native kernels in it, goes on.
FROM python:3.11-slim AS wheel
RUN apt-get update && apt-get install --yes --no-install-recommends g++
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY npu_wire npu_wire
COPY npu_server npu_server
COPY trainer_client trainer_client
RUN pip wheel --no-cache-dir --disable-pip-version-check --no-deps --wheel-dir /dist .

FROM python:3.11-slim
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NUMBA_CACHE_DIR=/tmp/numba OMP_WAIT_POLICY=PASSIVE
WORKDIR /app
COPY constraints.txt ./
# PyTorch's own index has a folder of wheels for each platform: cpu, or a CUDA version such as cu130. Without an
# index pip takes torch from where it takes the rest.
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl
# the largest wheel in a layer of its own: it changes least
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX/$TORCH} torch
COPY --from=wheel /dist /dist
RUN pip install -c constraints.txt "$(echo /dist/*.whl)[server]"
USER 10001:10001
EXPOSE 50051 8080
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=12 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=2)"]
ENTRYPOINT ["npu-server"]
CMD ["serve", "--listen", "0.0.0.0:50051", "--http", "0.0.0.0:8080", "--insecure"]
