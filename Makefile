# Each target does its own set-up: a virtual environment in .venv, made anew when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv

.PHONY: run test check

# Trains the embedded default on this machine's CPU (or GPU): about a minute.
run: $(VENV)/.installed
	$(VENV)/bin/fastlora run tiny

test: check
	$(VENV)/bin/pytest -n auto --dist loadgroup

check: $(VENV)/.installed
	$(VENV)/bin/ruff format --check --quiet
	$(VENV)/bin/ruff check --quiet
	$(VENV)/bin/mypy
	$(VENV)/bin/python -P benchmarks/readme.py --check
	$(VENV)/bin/lint-imports --no-cache > /dev/null || $(VENV)/bin/lint-imports --no-cache

$(VENV)/.installed: pyproject.toml hatch_build.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@
