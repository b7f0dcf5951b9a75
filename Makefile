# make demo | test | check | bench | bench-batch | bench-peers | clean
#
# Everything is installed into .venv (peers of the bench into .venv-peers); the stamp files in there make
# the second run quick. The install is editable, so that a changed source file needs no new one.

PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
PY := $(VENV)/bin/python
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check bench bench-batch bench-peers clean
.SILENT:

demo: $(VENV)/.installed
	$(PY) examples/stdlib_survey.py

test: $(VENV)/.test
	$(PY) -m pytest $(PYTEST_ARGS)

check: $(VENV)/.test $(VENV)/.dev
	$(PY) -m ruff check --quiet --output-format=concise .
	$(PY) -m mypy
	$(VENV)/bin/vermin --quiet --target=3.9- --violations --no-tips ipclite examples tests bench
	$(PY) -m pytest -q tests/unit/test_architecture.py

bench: $(VENV)/.test
	$(PY) -m bench.run --quick $(BENCH_ARGS)

bench-batch: $(VENV)/.test
	$(PY) -m bench.batch $(BENCH_ARGS)

bench-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m bench.run --quick --peers $(BENCH_ARGS)

$(VENV)/bin/python $(PEERS)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' \
	  || { echo "ipclite needs Python 3.9 or newer: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "This Python can not make virtual environments; on Debian: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(dir $(@D))

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PY) $(PIP) -e .
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PY) $(PIP) -e '.[test]'
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PY) $(PIP) -e '.[dev]'
	touch $@

$(PEERS)/.installed: pyproject.toml | $(PEERS)/bin/python
	$(PEERS)/bin/python $(PIP) -e '.[bench-peers]'
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
