# The five habits. Each sets itself up in .venv from pinned versions; nothing but Python 3.11 with pip is needed.
#   make demo [PROMPTS=file]   make test [TESTS=path]   make check   make bench   make docs
PYTHON ?= python3
BIN := .venv/bin
PROMPTS ?= demo/prompts.jsonl
TESTS ?= tests
NATIVE := scripts/native.py $(wildcard src/edgewise/engines/native/*.[ch])

.PHONY: demo test check bench docs

demo: .venv/.demo
	$(BIN)/python demo/run.py "$(PROMPTS)"

test: .venv/.dev
	$(BIN)/python -m pytest -m "not slow" $(TESTS)

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/wheels.py

bench: .venv/.dev
	scripts/bench

docs: .venv/.dev
	$(BIN)/python scripts/cli_docs.py
	$(BIN)/python scripts/figures.py

.venv/.%: requirements/%.txt requirements/demo.txt requirements/run.txt pyproject.toml scripts/setup $(NATIVE)
	scripts/setup "$(PYTHON)" $*
