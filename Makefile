# Everything runs in a virtual environment of the project's own, made on first use.
# The compiled extension is built where there is a C++ compiler; FUSEDNORM_BUILD=none leaves it out.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
FUSEDNORM_BUILD ?= auto
SOURCES := $(shell find csrc -type f ! -name '*.md')

.PHONY: train test lint bench codegen mutants clean

train: $(VENV)/ready
	$(BIN)/python examples/train_gpt.py $(ARGS)

# One thread a worker: two tests at a time, not two tests that fight for the same cores.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(wildcard tests/simt/* tests/fake_gpu/*.c)
	$(BIN)/mypy -p fusednorm

# Two minutes of the benchmark: table, plots and page in bench/results. ARGS="--help" for more.
bench: $(VENV)/ready
	$(BIN)/python -m bench $(ARGS)

# Breaks each kernel in turn and shows what notices.
mutants: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

$(VENV)/ready: requirements-dev.txt pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements-dev.txt
	FUSEDNORM_BUILD=$(FUSEDNORM_BUILD) $(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

# What depends on Triton's version, under another one: make codegen TRITON=3.6.0
TRITON ?= 3.6.0
CODEGEN_VENV := .venv-triton-$(TRITON)

codegen: $(CODEGEN_VENV)/ready
	$(CODEGEN_VENV)/bin/python -m pytest tests/test_codegen.py tests/test_fake_gpu.py $(ARGS)

$(CODEGEN_VENV)/ready: requirements-dev.txt pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv $(CODEGEN_VENV)
	grep -v '^triton==' requirements-dev.txt | sed 's/^numpy==.*/numpy<2.4/' > $(CODEGEN_VENV)/requirements.txt
	$(CODEGEN_VENV)/bin/pip install --quiet -r $(CODEGEN_VENV)/requirements.txt triton==$(TRITON)
	FUSEDNORM_BUILD=$(FUSEDNORM_BUILD) $(CODEGEN_VENV)/bin/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) .venv-triton-* build *.egg-info
