# SPDX-License-Identifier: Apache-2.0
# Both targets need nothing but Python 3.11 to 3.13; they make a virtual environment of their own in .venv.
#   make reproduce    the headline tables on embedded data (20 to 30 minutes on four CPU cores)
#   make test         the test suite, but for
#   make test-long    studies, notebooks and sharded models that take a minute or more each
#   make test-chips   kernels compiled for TPU v4, v5p and v6e, and steps of more configs (make test compiles kernels for v5e)
#   make lint         ruff, with the settings of pyproject.toml

PYTHON ?= python3
VENV ?= .venv
SUITE ?= headline
ONLY ?=
# Both targets are meant for any machine; set JAX_PLATFORMS=cuda or tpu to use an accelerator that is installed.
export JAX_PLATFORMS ?= cpu

.PHONY: reproduce test test-long test-chips lint clean

$(VENV)/installed: setup.py
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f'Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}; try make PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable ".[test]"
	touch $@

reproduce: $(VENV)/installed
	$(VENV)/bin/python -m experiments.reproduce --suite=$(SUITE) --only=$(ONLY)

test: $(VENV)/installed
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder -m "not every_chip and not long"

test-long: $(VENV)/installed
	$(VENV)/bin/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder -m long

test-chips: $(VENV)/installed
	$(VENV)/bin/python -m pytest --numprocesses=auto --dist=worksteal -m every_chip

lint: $(VENV)/installed
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

clean:
	rm -rf $(VENV) runs
