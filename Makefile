# `make demo` and `make test` need nothing but Python 3.11: everything is installed into .venv.

PYTHON ?= $(shell command -v python3.11)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check install format clean

demo: install
	$(BIN)/entropi demo

test: check
	$(BIN)/python -m pytest -m "(slow or two_party) and not gpu"

# Under three minutes once installed: style, types, fast tests.
check: install
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow and not two_party and not gpu" -n auto --dist loadfile

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed: the pins are for it, and the secure engine has wheels for 3.10 and 3.11 only"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=23" "setuptools>=77" wheel
	@echo "installing into $(VENV); this takes a minute or more and about 2.5 GB of disk"
	# torch first and by its exact version: an open range could bring a build with gigabytes of GPU libraries.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[private,report,dev]"
	@touch $(INSTALLED)

format: install
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

clean:
	rm -rf $(VENV) runs build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
