# The five habits. Each sets itself up in .venv from pinned versions; nothing but Python 3.11 with pip is needed.
#   make demo [PROMPTS=file]   make test [TESTS=path]   make check   make bench   make docs
PYTHON ?= python3
BIN := .venv/bin
PROMPTS ?= demo/prompts.jsonl
TESTS ?= tests
EXPORT := $(wildcard src/edgewise/export/*/environments/torch.txt)
EXPORTED := .cache/environments/torch/edgewise-environment.json
NATIVE := scripts/native.py $(wildcard src/edgewise/engines/native/*.[ch])

.PHONY: demo test check bench docs

demo: .venv/.demo
	$(BIN)/python demo/run.py "$(PROMPTS)"

test: .venv/.dev $(EXPORTED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(TESTS)

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

# The converters, which cannot live in .venv; made once, 2.5 GB. edgewise itself looks whether they are those of the lock.
$(EXPORTED): $(EXPORT) | .venv/.dev
	EDGEWISE_HOME="$(CURDIR)/.cache" $(BIN)/edgewise doctor --install torch
	touch $@

.venv/.%: requirements/%.txt requirements/demo.txt requirements/run.txt pyproject.toml scripts/setup $(NATIVE)
	scripts/setup "$(PYTHON)" $*
