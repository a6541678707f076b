# Set-up and everyday commands. `make chat` and `make test` do everything from a fresh clone; a second run is quick.
# GNU make 3.81 (macOS) is enough.

# The first Python that is new enough: on a Mac, python3 may be Apple's 3.9 with a newer one beside it.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && exit; done; echo python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The prompt reaches the program through the environment, so that quotes, dollars and spaces in it mean nothing to make
# or to the shell.
ifneq ($(origin PROMPT),undefined)
ONCE := --prompt="$$MLXMOE_PROMPT"
export MLXMOE_PROMPT := $(value PROMPT)
unexport PROMPT
endif

.PHONY: help chat test clang clean
.DELETE_ON_ERROR:

help:
	@echo 'make chat               talk with the demo model in the terminal; sets up .venv first'
	@echo 'make chat PROMPT="..."  answer once and exit'
	@echo 'make test               ruff, mypy and pytest; sets up .venv with the development tools first'
	@echo 'make clean              remove .venv and all that was built'

chat: .venv/installed
	@$(BIN)/python -m mlxmoe chat $(ONCE)

test: .venv/installed-dev clang
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest

# The tests that execute Metal kernels compile them with clang-19 (x86-64 Linux). Where it cannot be had they are skipped,
# with a line that says so; with CI=true that is a failure.
clang:
	@if [ "$$(uname -sm)" = "Linux x86_64" ] && ! command -v clang-19 >/dev/null && command -v apt-get >/dev/null \
	  && [ "$$(id -u)" = 0 ]; then \
	  echo 'Installing clang-19 for the tests of the Metal kernels; this happens once.' >&2; \
	  { apt-get -o APT::Sandbox::User=root update -qq; \
	    apt-get -o APT::Sandbox::User=root install -y -qq --no-install-recommends clang-19; } >&2 \
	  || echo 'clang-19 could not be installed: tests of Metal kernels are skipped' >&2; \
	fi

clean:
	@rm -rf .venv .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find mlxmoe convert bench tests -name __pycache__ -type d -prune -exec rm -rf {} +

# What pip says goes to stderr: stdout belongs to the answer. The development install holds the plain one.
.venv/installed: pyproject.toml $(BIN)/python
	@echo 'Setting up .venv; this happens once.' >&2
	@$(PIP) install --editable . >&2
	@touch $@

.venv/installed-dev: pyproject.toml $(BIN)/python
	@echo 'Setting up .venv with the development tools; this happens once.' >&2
	@$(PIP) install --editable '.[dev]' >&2
	@touch .venv/installed $@

# A link to the system's Python: gone or dangling (Python was removed or the first try failed), it is made anew.
$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'mlxmoe needs Python 3.11 or newer, and "$(PYTHON)" is not: install it (macOS: brew install python;' \
	    'Debian: apt-get install python3 python3-venv) or name one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@"$(PYTHON)" -c 'import platform, sys; sys.exit(sys.platform == "darwin" and platform.machine() != "arm64")' || { \
	  echo 'mlxmoe needs an Apple Silicon Mac and a Python built for it, and "$(PYTHON)" is an Intel build:' \
	    'install one (brew install python, or the installer from python.org)' >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'mlxmoe needs the venv module of Python, which "$(PYTHON)" lacks: install it' \
	    '(Debian: apt-get install python3-venv) and run make again' >&2; exit 1; }
	@"$(PYTHON)" -m venv --clear .venv
