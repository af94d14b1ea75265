# One environment for everything: .venv, built from requirements.lock (versions and hashes).
# Needs only Python 3.11 to 3.13, git and make.

VENV := .venv
BIN := $(VENV)/bin
OUT := quickstart
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
FILES := $(sort $(shell find tests -name "test_*.py"))
JOBS := $(shell getconf _NPROCESSORS_ONLN)
LOCKED := $(VENV)/.locked
INSTALLED := $(VENV)/.installed
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))

# Python keeps the bytecode of modules, whatever the environment says: otherwise every process compiles thousands of them again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help env quickstart test test-fast test-slow test-isolated lint types rooms docs format lock clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(INSTALLED)  ## build or update .venv from requirements.lock

quickstart: $(INSTALLED)  ## pre-train a tiny CoMA-DyViT for two minutes, show what it learned, export and verify it
	$(BIN)/coma quickstart --out $(OUT) $(ARGS)
	$(BIN)/coma export $(OUT)/run/artifact --precision fp32,fp16 --benchmark-seconds 1

test: $(INSTALLED)  ## run the tests in random order, in ten minutes on two cores (ARGS="-k name" picks some)
	$(PYTEST) $(ARGS)

test-fast: $(INSTALLED)  ## run the unit tests that need no OpenMMLab, in a minute
	$(PYTEST) -m "not slow and not openmmlab" $(ARGS) tests/unit

test-slow: $(INSTALLED)  ## run the tests that take minutes: sweeps, compilers, dry runs
	$(PYTEST) -m slow $(ARGS)

test-isolated: $(INSTALLED)  ## run every test file in a process of its own, JOBS at a time (FILES=... picks some)
	@printf '%s\n' $(FILES) | xargs -P $(JOBS) -I FILE sh -c ' \
		said=$$($(BIN)/python -m pytest --numprocesses 0 -p no:cacheprovider $(ARGS) FILE 2>&1); \
		case $$? in 0|5) outcome=passed code=0;; *) outcome=FAILED code=1; printf "%s\n" "$$said";; esac; \
		echo "$$outcome FILE: $$(printf "%s" "$$said" | tail -n 1 | tr -d =)"; exit $$code'

lint: $(INSTALLED)  ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)  ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python

rooms: $(INSTALLED)  ## check which module may import which
	$(BIN)/lint-imports

docs: $(INSTALLED)  ## build the documentation into build/docs; it needs no network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: $(INSTALLED)  ## apply the formatting
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock: $(INSTALLED)  ## renew requirements.lock from pyproject.toml
	$(BIN)/uv pip compile --quiet --upgrade --universal --fork-strategy fewest --python-version 3.11 \
		--generate-hashes --custom-compile-command "make lock" --group dev --group docs --extra classify --extra downstream \
		--extra mmcv-lite --extra export --extra demo --extra heic --extra dicom --extra parquet --extra remote --extra search --extra ray \
		--extra track --extra onnxruntime-gpu --extra openvino --extra tensorrt-rtx --extra tritonclient \
		--output-file requirements.lock pyproject.toml

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist

$(BIN)/python:
	@for python in python3 python3.13 python3.12 python3.11 python; do \
		if "$$python" -c '$(FITS)' 2>/dev/null; then \
			echo "creating $(VENV) with $$("$$python" --version)"; exec "$$python" -m venv $(VENV); \
		fi; \
	done; echo "Python 3.11, 3.12 or 3.13 was not found on the PATH; install one and run make again" >&2; exit 1

$(LOCKED): requirements.lock | $(BIN)/python
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(BIN)/python -m pip install --quiet "$$(grep -o '^uv==[^ ;]*' requirements.lock)"
	$(BIN)/uv pip sync --python $(BIN)/python --require-hashes requirements.lock
	@touch $@

$(INSTALLED): pyproject.toml $(LOCKED)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@
