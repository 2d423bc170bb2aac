# Every target makes .venv itself; nothing but python3 (3.11 or newer) has to be there.
BIN := .venv/bin
STAMP := .venv/.stamp

.PHONY: help venv demo test check bench docs

help:
	@echo "make venv | demo | test | check | bench | docs"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,track]"
	touch $(STAMP)

demo: venv
	$(BIN)/voxelstem demo

test: check docs
	$(BIN)/pytest

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/pytest tests/test_architecture.py

bench: venv
	@for claim in benchmarks/*.py; do echo "== $$claim"; $(BIN)/python "$$claim" || exit 1; done

docs: venv
	$(BIN)/zensical build --clean --strict
