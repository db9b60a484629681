# Everything runs in a virtual environment of the project's own, made on first use.
# The compiled extension is built where there is a C++ compiler; FUSEDNORM_BUILD=none leaves it out.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
FUSEDNORM_BUILD ?= auto
SOURCES := $(shell find csrc -type f ! -name '*.md')

.PHONY: train test lint bench codegen mutants clean wheel matrix release workflows

train: $(VENV)/ready
	$(BIN)/python examples/train_gpt.py $(ARGS)

# One thread a worker: two tests at a time, not two tests that fight for the same cores.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(wildcard tests/simt/* tests/nvcc/*)
	$(BIN)/mypy -p fusednorm
	$(BIN)/mypy toolchain.py tools triton_kernels/config.py
	$(BIN)/codespell $$(git ls-files)

# Two minutes of the benchmark: table, plots and page in bench/results. ARGS="--help" for more.
bench: $(VENV)/ready
	$(BIN)/python -m bench $(ARGS)

# Breaks each kernel in turn and shows what notices.
mutants: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

$(VENV)/ready: requirements-dev.txt pyproject.toml setup.py toolchain.py $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements-dev.txt
	FUSEDNORM_BUILD=$(FUSEDNORM_BUILD) $(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

# The code-generation tests under another Triton: make codegen TRITON=3.6.0
TRITON ?= 3.6.0
CODEGEN_VENV := .venv-triton-$(TRITON)

codegen: $(CODEGEN_VENV)/ready
	$(CODEGEN_VENV)/bin/python -m pytest tests/test_codegen.py $(ARGS)

$(CODEGEN_VENV)/ready: requirements-dev.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(CODEGEN_VENV)
	grep -v '^triton==' requirements-dev.txt | sed 's/^numpy==.*/numpy<2.4/' > $(CODEGEN_VENV)/requirements.txt
	$(CODEGEN_VENV)/bin/pip install --quiet -r $(CODEGEN_VENV)/requirements.txt triton==$(TRITON)
	FUSEDNORM_BUILD=none $(CODEGEN_VENV)/bin/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

# The sdist, and from it the wheel, which then has to pass what package indices and users ask of it.
# FUSEDNORM_BUILD=cuda: with the CUDA kernels. torch's libraries are those of the torch that loads it.
WHEEL_BUILD := $(if $(filter auto,$(FUSEDNORM_BUILD)),cpu,$(FUSEDNORM_BUILD))
RAW := build/wheel

wheel: $(VENV)/ready-release
	rm -rf $(RAW) dist
	FUSEDNORM_BUILD=$(WHEEL_BUILD) $(BIN)/python -m build --no-isolation --outdir $(RAW)
	$(if $(filter none,$(WHEEL_BUILD)),cp -r $(RAW) dist,\
		PATH="$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
		--wheel-dir dist $(RAW)/*.whl && cp $(RAW)/*.tar.gz dist && $(BIN)/abi3audit --strict --summary dist/*.whl)
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/python -m twine check --strict dist/*
	ls -l dist

# The wheel in clean environments: which torch, with and without Triton, NumPy and a compiler.
matrix: $(VENV)/ready-release
	$(BIN)/python tools/matrix.py $(ARGS)

# Checks that tree, tag, version, changelog and docs agree: make release VERSION=0.1.0
release:
	$(PYTHON) tools/release.py $(VERSION)

# The workflows and the forms, against their schemas.
workflows: $(VENV)/ready-release
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

$(VENV)/ready-release: $(VENV)/ready requirements-release.txt
	$(BIN)/pip install --quiet -r requirements-release.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-triton-* build dist *.egg-info
