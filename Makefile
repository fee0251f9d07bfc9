# Both main targets work in their own virtual environment, .venv, made on first use; later runs reuse it.
#   make clean demo PYTHON=python3.12 CONSTRAINTS=     another Python, newest versions of everything
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-all lint clean

help:
	@echo "make demo    install into .venv without PyTorch, then let a small trained model continue a Python file"
	@echo "             (make demo FILE=path.py: yours), with checks, speed and two pictures"
	@echo "make test    install the test tools and PyTorch too, then check style, types and run the tests"
	@echo "make test-all  the same and the long tests, some minutes more"
	@echo "make lint    the style and type checks of make test alone"
	@echo "make clean   remove .venv, runs/ and caches"

# On CPU unless told otherwise: make test installs libtpu, which would look for a TPU first, and at length.
demo: $(VENV)/.demo
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python -m dsa_jax.demo $(if $(FILE),'$(FILE)')

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup --timeout 600 -m "not nightly" tests

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup --timeout 600 tests

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "dsa-jax needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "could not make $(VENV): on Debian and Ubuntu, install the package python3-venv"; rm -rf $(VENV); exit 1; }
	@touch $@

$(VENV)/.demo: pyproject.toml $(CONSTRAINTS) | $(VENV)/.python
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml $(CONSTRAINTS) | $(VENV)/.python
	$(INSTALL) -e '.[demo,parity,test,tpu]'
	@touch $@

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
