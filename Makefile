# Everything runs in a virtual environment of the project's own, made on first use.
# The compiled extension is built where there is a C++ compiler; FUSEDNORM_BUILD=none leaves it out.
PYTHON ?= python3
# Another torch or Triton gets an environment of its own: make test TORCH=2.14.1, with the Triton that
# it brings or with TRITON=3.6.0.
TORCH ?=
TRITON ?=
VENV := .venv$(TORCH:%=-torch-%)$(TRITON:%=-triton-%)
BIN := $(VENV)/bin
JOBS ?= 2
FUSEDNORM_BUILD ?= auto
SOURCES := $(shell find csrc -type f ! -name '*.md')

.PHONY: train test lint bench mutants docs docs-serve wheel matrix release workflows clean

train: $(VENV)/ready
	$(BIN)/python examples/train_gpt.py $(ARGS)

# One thread a worker: two tests at a time, not two tests that fight for the same cores.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(wildcard tests/simt/* tests/nvcc/* tests/fake_gpu/*.c)
	$(BIN)/mypy -p fusednorm -p bench
	$(BIN)/mypy toolchain.py tools triton_kernels/config.py triton_kernels/launch.py triton_kernels/plans.py
	$(BIN)/codespell $$(git ls-files)
	@! $(BIN)/python -c 'import mkdocs' 2>/dev/null || $(SITE) build --strict

# Two minutes of the benchmark: table, plots and page in bench/results. ARGS="--help" for more.
bench: $(VENV)/ready
	$(BIN)/python -m bench $(ARGS)

# The site, in build/site: it opens without a network. Missing pages and links stop the build.
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs

docs: $(VENV)/ready-docs
	$(BIN)/python docs/notebook.py by-hand
	$(SITE) build --strict

docs-serve: $(VENV)/ready-docs
	$(SITE) serve --livereload

$(VENV)/ready-docs: $(VENV)/ready requirements-docs.txt
	$(BIN)/pip install --quiet -r requirements-docs.txt
	touch $@

# Breaks each kernel in turn, then the Python layer at random, and shows what notices.
# ARGS="--help" for what to draw: --seed, --count and parts of names.
mutants: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/python_mutants.py $(ARGS)

# A release of torch asks for one Triton, so another one is put over it. Triton's interpreter takes
# numpy 2.4 from 3.9 on.
$(VENV)/ready: requirements-dev.txt pyproject.toml setup.py toolchain.py $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	sed -e '' $(if $(TORCH),-e 's/^torch==.*/torch==$(TORCH)/') \
		$(if $(TORCH)$(TRITON),-e '/^triton==/d' -e 's/^numpy==[^;]*/numpy<2.4/') \
		requirements-dev.txt > $(VENV)/requirements.txt
	$(BIN)/pip install --quiet -r $(VENV)/requirements.txt
	$(if $(TRITON),$(BIN)/pip install --quiet triton==$(TRITON))
	FUSEDNORM_BUILD=$(FUSEDNORM_BUILD) $(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
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

# The workflows and the forms, against their schemas; and what a workflow must not do.
workflows: $(VENV)/ready-release
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/zizmor --offline --quiet .github

$(VENV)/ready-release: $(VENV)/ready requirements-release.txt
	$(BIN)/pip install --quiet -r requirements-release.txt
	touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info
