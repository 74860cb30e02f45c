# Every target sets up what it needs, on a machine with Python 3.11 or newer and access to PyPI.
PYTHON ?= python3
VENV   := .venv
LOW    := .venv-low
PIP    := -q --disable-pip-version-check

.PHONY: quickstart test check test-low docs clean

quickstart: $(VENV)/ready          ## Fine-tune the embedded model, offline, on the CPU; writes output/quickstart/report.html
	$(VENV)/bin/aligntune quickstart

test: $(VENV)/ready                ## The whole test suite on the newest tested versions, a file at a time on each of up to four cores
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: $(VENV)/ready               ## Style, types, import order, generated docs
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python scripts/generated.py --check

test-low: $(LOW)/ready             ## The tests that touch TRL, on the oldest tested versions
	OMP_NUM_THREADS=1 $(LOW)/bin/python -m pytest -m adapter

docs: $(VENV)/ready                ## The documentation site, into site/
	$(VENV)/bin/pip install $(PIP) -e '.[docs]'
	$(VENV)/bin/python scripts/generated.py
	$(VENV)/bin/mkdocs build --strict

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP) -c constraints.txt -e '.[dev,eval,rewards,tensorboard,quant]'
	touch $@

$(LOW)/ready: pyproject.toml constraints-low.txt
	$(PYTHON) -m venv $(LOW)
	$(LOW)/bin/pip install $(PIP) -c constraints-low.txt -e '.[dev,eval,rewards,tensorboard]'
	touch $@

clean:
	rm -rf $(VENV) $(LOW) site build dist .pytest_cache .ruff_cache .mypy_cache
