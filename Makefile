# `make demo` works in the virtual environment .venv, made on first use with PYTHON; `make test` makes its own, one for
# each environment of tests/environments.py, with the Pythons that it finds.
#   make clean demo PYTHON=python3.12 CONSTRAINTS=     another Python, newest versions of everything
PYTHON ?= python3
CONSTRAINTS ?= constraints/$(shell $(PYTHON) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-all lint clean

help:
	@echo "make demo    install into .venv without PyTorch, then let a small trained model continue a Python file"
	@echo "             (make demo FILE=path.py: yours), with checks, speed and two pictures"
	@echo "make test    check style and types, then run the tests with each supported JAX that there is a Python for:"
	@echo "             3.11 (PyTorch is installed too, to compare with), and 3.12 or newer"
	@echo "make test-all  the same and the slow tests, some minutes more"
	@echo "make lint    the style and type checks of make test alone"
	@echo "make clean   remove the virtual environments, runs/ and caches"

# On CPU unless told otherwise: where libtpu is installed too, JAX would look for a TPU first, and at length.
demo: $(VENV)/.demo
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python -m dsa_jax.demo $(if $(FILE),'$(FILE)')

test:
	@$(PYTHON) tests/environments.py

test-all:
	@$(PYTHON) tests/environments.py --slow

lint:
	@$(PYTHON) tests/environments.py --lint

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "dsa-jax needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "could not make $(VENV): on Debian and Ubuntu, install the package python3-venv"; rm -rf $(VENV); exit 1; }
	@touch $@

$(VENV)/.demo: pyproject.toml $(CONSTRAINTS) | $(VENV)/.python
	$(INSTALL) -e '.[demo]'
	@touch $@

clean:
	rm -rf .venv* runs build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
