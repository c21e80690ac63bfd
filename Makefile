# Two commands on a fresh machine: `make demo` and `make test`. Each sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR := runs/demo

.PHONY: demo test lint clean

demo: $(VENV)/base
	rm -rf $(DEMO_DIR)
	$(BIN)/python main_pretrain.py @recipes/demo.args --output_dir $(DEMO_DIR)

test: $(VENV)/test
	$(BIN)/python -m pytest -q

lint: $(VENV)/test
	$(BIN)/ruff check .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/base: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e ".[test]"
	@touch $@ $(VENV)/base

clean:
	rm -rf $(VENV) runs
