# make demo: sets up and runs the main job on the embedded emulator. make test: sets up and passes the tests.
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
PYTHON ?= python3
# gencode of the oldest protobuf that we support runs on it and on the next major version
PROTO_TOOLS := grpcio-tools==1.76.0
PROTO_OUT ?= .
# judges and networks whose packages ask for other versions than they need: torchvision, an old numpy
WITHOUT_DEPENDENCIES := geffnet==1.0.2 tosa-tools==2026.8.0

# nearly every test computes on one core, and there are two; a file's tests share servers and networks
PARALLEL := --numprocesses 2 --dist loadfile

.PHONY: install demo test test-slow test-wheel conformance mutations breadth fuzz-wire soak bench lint proto clean

install: $(VENV)/.dev

$(VENV)/.both: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[server,trainer]'
	@touch $@

$(VENV)/.dev: $(VENV)/.both
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps $(WITHOUT_DEPENDENCIES)
	@touch $@

demo: $(VENV)/.both
	$(BIN)/npu-trainer demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m 'not slow'

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m slow

# The built wheel in four clean environments: each command works there, or names its install line.
test-wheel:
	$(PYTHON) -m tests.wheel

# The judges, at length, and the compiler before a second opinion: rewrites docs/conformance-*.md.
conformance: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.judges --write
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.independent --write

# Small errors put into the arithmetic on purpose, each to be noticed by somebody else's numbers: rewrites
# docs/mutations.md.
mutations: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutations

# Every class of `transformers`' mappings that builds here, and others, in the loop: rewrites docs/breadth.md.
breadth: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.breadth --jobs 2 --write

# Hostile clients against a real server, beside a well-behaved one: an hour. MINUTES=1 SEED=7 for another run.
fuzz-wire: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz_wire --minutes $(or $(MINUTES),60) $(if $(SEED),--seed $(SEED))

# Either side of shared memory killed at random times, nothing left behind: half an hour. BATCHES=1000 for less.
soak: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --batches $(or $(BATCHES),100000)

# How fast each part is beside its peers, on an otherwise idle machine (5 minutes): rewrites benchmarks/results.
bench: install
	OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 $(BIN)/python benchmarks/emulator.py --write
	$(BIN)/python benchmarks/transport.py --write
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/weights.py --write
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training_step.py --write

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

proto: $(VENV)-proto/.installed
	$(VENV)-proto/bin/python -m grpc_tools.protoc -I proto --python_out=$(PROTO_OUT) --pyi_out=$(PROTO_OUT) proto/npu_wire/v1/*.proto
	$(VENV)-proto/bin/python -m grpc_tools.protoc -I proto --grpc_python_out=$(PROTO_OUT) proto/npu_wire/v1/npu.proto

$(VENV)-proto/.installed: Makefile
	$(PYTHON) -m venv $(VENV)-proto
	$(VENV)-proto/bin/pip install --quiet --disable-pip-version-check '$(PROTO_TOOLS)'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-proto build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
