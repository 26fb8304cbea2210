# make quickstart   text to a served chat model, in minutes on a CPU
# make test         lint and the test suite; the chat page is tested where there is a Chromium
# make test-exhaustive  every layout of layers and adapters, learning curves, what TPUs would run, killed processes
# make test-fast    what one runs while working: lint and the tests that are not slow
# make test-optimized   the tests of the numerics, compiled as for users
# make test-parity      what is exported, read by Hugging Face's transformers
# All do all of their own set-up in .venv. `make test PYTHON=python3.12` uses another interpreter, given by name or by
# path, in a folder of its own: .venv-3.12.

SUPPORTED := python3.11 python3.12 python3.13 python3
PYTHON ?= $(shell for p in $(SUPPORTED); do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Empty where there is no such interpreter, or an older one.
VERSION := $(shell $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) and print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := $(if $(filter 3.11,$(VERSION)),.venv,.venv-$(VERSION))
# Python 3.11 is what is pinned; others take the newest versions that pyproject.toml allows.
CONSTRAINTS := $(if $(filter 3.11,$(VERSION)),--constraint constraints.txt)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet $(CONSTRAINTS)
WORKERS ?= 2
# In the order of tests/conftest.py.
SHARED_OUT := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: install install-dev quickstart test test-fast test-exhaustive test-optimized test-parity verify lint format clean

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

quickstart: install
	$(VENV)/bin/maxlm quickstart

test: install-dev lint
	$(VENV)/bin/python -m pytest $(SHARED_OUT) -m "not exhaustive"

test-fast: install-dev lint
	$(VENV)/bin/python -m pytest $(SHARED_OUT) -m "not slow and not exhaustive"

test-exhaustive: install-dev
	$(VENV)/bin/python -m pytest $(SHARED_OUT) -m exhaustive

# All other targets compile tests without optimization (tests/xla_flags.py), which could hide an error of rounding.
test-optimized: install-dev
	XLA_FLAGS=--xla_force_host_platform_device_count=8 \
	  $(VENV)/bin/python -m pytest $(SHARED_OUT) tests/ops tests/train/test_step.py tests/models/test_decoder.py

# What is made here, read by Hugging Face's transformers. Installs PyTorch, of more than a gigabyte.
test-parity: $(VENV)/.installed-parity
	$(VENV)/bin/python -m pytest -n $(WORKERS) tests/parity

# The summary in docs/verify.md, and every variant of every recipe in runs/verify.md
verify: install
	$(VENV)/bin/python tools/verify_all.py

lint: install-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: install-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf .venv .venv-* build *.egg-info

$(VENV)/bin/python:
	@test -n "$(VERSION)" || { echo "maxlm needs Python 3.11 or newer, and $(or $(PYTHON),none of $(SUPPORTED)) is not one that" \
	  "runs here: install it, or name another with PYTHON=, by name or path"; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[serve]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.installed-parity: $(VENV)/.installed-dev
	$(PIP) --editable '.[parity]'
	@touch $@
