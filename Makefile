# Every target works as the first command on a fresh machine with Python 3.11+.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.midway-installed
ARGS   ?=
# another index of torch's wheels, those for CPUs alone, say
TORCH_INDEX ?=
# a process for each core, up to 8, and each file's tests in one of them
TESTS  := -m pytest -n auto --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help dev demo demo-mnist prove test test-slow check format docs bench gpu clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Midway needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Set PYTHON=python3.12, say.")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch, torchvision and the rest into $(VENV) (several GB the first time)."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	mkdir -p .imports/midway
	ln -sfn ../../gen .imports/midway/gen
	ln -sfn ../../samplers .imports/midway/samplers
	ln -sfn ../../tokenizers .imports/midway/tokenizers
	ln -sfn ../../gen/front/__init__.py ../../gen/front/__main__.py .imports/midway/
	touch $(STAMP)

dev: $(STAMP) ## create the virtual environment and install Midway into it

demo: $(STAMP) ## train, sample and measure on real digits; ends with a table and runs/demo/report.html
	$(BIN)/python scripts/demo.py $(ARGS)

prove: $(STAMP) ## measure all solvers on an exact model; ends with a table and runs/prove/report.html
	$(BIN)/python scripts/prove_solvers.py $(ARGS)

demo-mnist: $(STAMP) ## the same on 5,000 digits of MNIST; longer
	$(BIN)/python scripts/demo.py --source mnist5k $(ARGS)

test: $(STAMP) ## the default test suite (no GPU, no network)
	$(BIN)/python $(TESTS) $(ARGS)

test-slow: $(STAMP) ## the default suite and the slow tests
	$(BIN)/python $(TESTS) -m '' $(ARGS)

check: $(STAMP) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP) ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## the site, in build/site; links and anchors are checked
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'mkdocs-material>=9.6,<10'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

bench: $(STAMP) ## measure speed beside named peers; writes benchmarks/results/*.json
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python benchmarks/samplers.py $(ARGS)
	$(BIN)/python benchmarks/quantizers.py $(ARGS)
	$(BIN)/python benchmarks/metrics.py $(ARGS)
	$(BIN)/python benchmarks/training.py $(ARGS)
	$(BIN)/python benchmarks/dit_speed.py
	$(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/loading.py

# the environment if there is one, else a Python that has torch already, as on GPU machines without a network; else `make dev`
HAS_TORCH := -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
gpu: ## all that only a CUDA machine can show, in nine minutes; writes benchmarks/results/gpu.json
	@mkdir -p .imports/midway
	@for folder in gen samplers tokenizers; do ln -sfn ../../$$folder .imports/midway/$$folder; done
	@if $(BIN)/python $(HAS_TORCH) 2>/dev/null; then python=$(BIN)/python; \
	elif $(PYTHON) $(HAS_TORCH); then python=$(PYTHON); \
	else $(MAKE) dev && python=$(BIN)/python || exit 1; fi; \
	PYTHONPATH="$(CURDIR)/.imports$${PYTHONPATH:+:$$PYTHONPATH}" exec "$$python" benchmarks/gpu.py $(ARGS)

clean: ## remove the virtual environment and caches, keep runs/
	rm -rf $(VENV) .imports midway.egg-info build .pytest_cache .ruff_cache
