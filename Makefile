# Start with `make demo` or `make quick`. Each command sets up the .venv that it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
DEMO_DIR := runs/demo
MAYBE_NATIVE = $(BIN)/python -m util.data.native build 2>&1 | head -n 1

# What the web site shows, and what its pages link.
PAGES := *.md CITATION.cff docs recipes benchmarks/README.md evidence/recipes tests/method/*.py \
    evidence/results/gpu/nvidia-h200/table.md

# The tests of parts: no processes, no training, nothing that takes seconds. Idle workers take tests from busy ones.
QUICK := -q -n 2 --dist worksteal -m "not slow" tests/unit tests/method

.PHONY: demo quick test coverage oldest native gpu lint docs clean

demo: $(VENV)/base
	@$(MAYBE_NATIVE)
	$(BIN)/python main_pretrain.py @recipes/demo.args --output_dir $(DEMO_DIR)

# Under 90 s on 2 cores.
quick: $(VENV)/test
	$(BIN)/python -m pytest $(QUICK)

# All tests. Two workers, a file each: the tests on SLURM, which come first, mostly wait.
test: $(VENV)/test
	@$(MAYBE_NATIVE)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# The same with the oldest versions that pyproject.toml allows, in an environment of their own.
oldest: $(OLDEST)/test
	@$(OLDEST)/bin/python -m util.data.native build 2>&1 | head -n 1
	$(OLDEST)/bin/python -m pytest -q

$(OLDEST)/test: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --upgrade pip uv
	VIRTUAL_ENV=$(OLDEST) $(OLDEST)/bin/uv pip install -q --resolution lowest-direct -e ".[test]"
	@touch $@

# JPEG crops in C: needs a compiler and libjpeg-turbo's headers. Without them everything works, more slowly.
native: $(VENV)/base
	$(BIN)/python -m util.data.native build

# All measurements and checks on one GPU; results go to runs/gpu. CAPS and LIMIT: see benchmarks/gpu.sh.
gpu: $(VENV)/test
	@$(MAYBE_NATIVE)
	CAPS=$${CAPS:-10} PY=$(BIN)/python bash benchmarks/gpu.sh

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/house/type_errors.py

# The lines that the quick tests do not reach.
coverage: $(VENV)/dev
	$(BIN)/python -m pytest $(QUICK) --cov --cov-report=term-missing:skip-covered

# The web site of the pages, in runs/docs/site. A broken link ends it, but not with --quiet.
docs: $(VENV)/docs
	rm -rf runs/docs
	mkdir -p runs/docs/pages
	tar cf - $(PAGES) | tar xf - -C runs/docs/pages
	$(BIN)/mkdocs build --strict

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/base: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e ".[test]"
	@touch $@ $(VENV)/base

$(VENV)/docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e ".[docs]"
	@touch $@ $(VENV)/base

# Everything for `test`, and the tools of `lint` and `coverage`.
$(VENV)/dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@ $(VENV)/test $(VENV)/base

clean:
	rm -rf $(VENV) $(OLDEST) runs
