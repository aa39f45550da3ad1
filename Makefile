.PHONY: help venv demo test test-fast test-faults image lint type bench clean
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# One thread a process: tests run in two processes, and small arrays lose more than they gain by sharing.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(VENV)/.done ## Set up .venv with the exact versions of constraints.txt

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "organseg needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tensorboard,wandb]'
	touch $@

demo: venv ## Train naive, INERRANT0 and INERRANT on a synthetic cohort at 10% labels, and show them
	$(BIN)/python tools/demo.py --out demo

test: venv ## All tests but the long fault campaigns
	$(TEST) -n 2 --dist worksteal -m "not faults and not alone" && $(TEST) -m "alone and not faults"

test-fast: venv ## The tests that take under three minutes together
	$(TEST) -n 2 --dist worksteal -m "not slow and not faults and not alone"

test-faults: venv ## The long fault campaigns
	ORGANSEG_COLD=1 $(TEST) -m faults

image: ## The image's steps without a container engine, into build/image (root; debootstrap, iproute2, util-linux)
	$(PYTHON) tools/image.py build --out build/image --build-arg TORCH=torch==2.13.0

lint: venv ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

type: venv ## mypy, strict
	$(BIN)/mypy && MYPYPATH=.:tools $(BIN)/mypy --explicit-package-bases tools/*.py

bench: venv ## Hot paths against peers, as ratios
	$(BIN)/python tools/bench/metrics.py && $(BIN)/python tools/bench/training.py && $(BIN)/python tools/bench/cache.py && $(BIN)/python tools/bench/prediction.py && $(BIN)/python tools/bench/windows.py && $(BIN)/python tools/bench/relabelling.py && $(BIN)/python tools/bench/attention.py && $(BIN)/python tools/bench/priors.py

clean: ## Remove what the targets above made
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache
