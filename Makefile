PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
OUT := out
# Two workers: what a small CI machine has. Override with `make test JOBS=8`.
JOBS ?= 2
# A worker keeps to neighbouring tests, which share what is compiled or exported for them.
PARALLEL = -n $(JOBS) --dist worksteal
THREADS ?= 2
MODEL := $(OUT)/swin_tiny_patch4_window7_224.onnx
# Exported test models, kept between runs and shared by the workers.
export ATTNREWRITE_TEST_CACHE ?= $(CURDIR)/build/test-models

.PHONY: setup demo test test-slow test-gpu property zoo coverage bench lint format clean

setup: $(STAMP)

# torch comes first and alone, so that nothing else chooses its build; torchvision and timm then take it as it is.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps "torchvision==0.28.0" "timm==1.0.31"
	touch $(STAMP)

demo: setup $(MODEL)
	$(BIN)/attnrewrite optimize $(MODEL) --target cpu --threads $(THREADS) -o $(OUT)/swin-cpu
	$(BIN)/attnrewrite bench $(OUT)/swin-cpu --threads $(THREADS)

$(MODEL): $(STAMP)
	mkdir -p $(OUT)
	$(BIN)/python examples/export_swin.py --timm -o $(MODEL)

test: setup
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: setup
	$(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow"

# On a machine with an NVIDIA GPU; without one every test is skipped.
test-gpu: setup
	$(BIN)/python -m pytest tests/cuda -m gpu

# Random spellings and near misses, many: minutes. tests/property/RESULTS.md records a run.
property: setup
	$(BIN)/python -m tests.property

# Real models of the packages that are installed: an hour at the first run. docs/coverage.md records one.
zoo: setup
	$(BIN)/python -m pytest tests/zoo $(PARALLEL) -m "slow or not slow"

coverage: setup
	$(BIN)/python -m tests.zoo --jobs $(JOBS)

# Every model against every peer: an hour or two. benchmarks/README.md says how to measure less.
bench: $(BENCH_STAMP)
	$(BIN)/python benchmarks/models.py --keep build/bench --json build/bench/results.json
	$(BIN)/python benchmarks/growth.py --keep build/bench

# spandrel would pull another torch, as timm would.
$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[dev,bench]"
	$(BIN)/python -m pip install --quiet --no-deps "spandrel==0.4.2"
	touch $(BENCH_STAMP)

# The type checker reads the source tree, where `passes` stands at the top: give it the installed layout.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/attnrewrite
	ln -s $(CURDIR)/attnrewrite/* build/types/attnrewrite/
	ln -s $(CURDIR)/passes build/types/attnrewrite/passes
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p attnrewrite

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist $(OUT) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
