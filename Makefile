# Everything sets itself up: .venv is built once, and again when what it is built from changes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo averages test test-slow lint wheel clean

demo: .venv/installed
	$(BIN)/python examples/digits.py

averages: .venv/installed
	$(BIN)/python examples/averages.py --out docs/averages_digits.md

test: .venv/installed
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: .venv/installed
	$(BIN)/python -m build --wheel

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv dist outputs
