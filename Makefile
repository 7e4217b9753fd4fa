# `make demo` and `make test` need nothing but Python 3.11: everything is installed into .venv.

PYTHON ?= $(shell command -v python3.11)
# What `make versions` tries; paths do as well.
PYTHONS ?= python3.10 python3.12 python3.13
VENV := .venv
BIN := $(VENV)/bin
CODE := src tests benchmarks examples docs
INSTALLED := $(VENV)/.installed
# Apart from the rest, whose versions exclude some of theirs.
TOOLS := .venv-tools
LOCKING := --quiet --generate-hashes --python-version 3.11 --python-platform x86_64-unknown-linux-gnu \
	--no-emit-index-url --custom-compile-command "make lock"
# Dates in what is built: the last commit's, or what the caller says.
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
# A worker a core, each taking whole files, in the order that tests/conftest.py gives them.
WORKERS := -n auto --dist loadfile --no-loadscope-reorder
# Tests of two parties wait a part of their time, for a timeout or for each other: one worker more than cores has work then.
CORES = $(shell getconf _NPROCESSORS_ONLN)
WORKERS_THAT_WAIT = -n $$(($(CORES) + 1)) --dist loadfile --no-loadscope-reorder
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' src/entropi/__init__.py)

.PHONY: demo test check coverage versions docs install format clean tools lock sbom wheel

demo: install
	$(BIN)/entropi demo

test: check docs tools
	$(BIN)/python -m pytest -m "(slow or two_party) and not gpu" $(WORKERS_THAT_WAIT) --durations=100 --durations-min=10

# Style, spelling, types, fast tests: minutes on two idle cores, and several times as long beside other work.
check: install
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/codespell $(CODE) *.md mkdocs.yml configs deploy
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow and not two_party and not gpu" $(WORKERS)

# Lines and branches that the fast tests reach, by room. Apart from `check`, which it would slow down.
coverage: install
	rm -rf build/coverage && mkdir -p build/coverage
	$(BIN)/python -m pytest -m "not slow and not two_party and not gpu" $(WORKERS) --cov --cov-report=
	@for room in $(notdir $(patsubst %/__init__.py,%,$(wildcard src/entropi/*/__init__.py))); do \
		printf '%-12s %4s %%\n' $$room "$$($(BIN)/coverage report --format=total --include="src/entropi/$$room/*")"; \
	done
	@printf '%-12s %4s %%\n' everything "$$($(BIN)/coverage report --format=total)"

# Training, diagnosing and recording on the other Pythons: torch for each, some minutes and up to six gigabytes. One that
# is not there is left out, and that is said.
versions:
	@for python in $(PYTHONS); do \
		if ! "$$python" -c "" 2>/dev/null; then echo "$$python is not here: left out"; continue; fi; \
		folder=.venv-versions/$$("$$python" -c "import sys; print('%d.%d' % sys.version_info[:2])"); \
		"$$python" -m venv $$folder && \
		$$folder/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 && \
		$$folder/bin/python -m pip install --quiet --disable-pip-version-check ".[report]" pytest && \
		$$folder/bin/python -m pytest -p no:cacheprovider tests/test_versions.py || exit 1; \
	done

# The documentation as a site that loads nothing from elsewhere, in build/site; a link that leads nowhere fails the build.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed: the pins are for it, and the secure engine has wheels for 3.10 and 3.11 only"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=23" "setuptools>=77" wheel
	@echo "installing into $(VENV); this takes a minute or more and about 2.5 GB of disk"
	# torch first and by its exact version: an open range could bring a build with gigabytes of GPU libraries.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[private,report,dev,docs]"
	@touch $(INSTALLED)

tools: $(TOOLS)/.installed

$(TOOLS)/.installed: deploy/tools.lock
	@test -n "$(PYTHON)" || { echo "Python 3.11 is needed: the pins are for it"; exit 2; }
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r deploy/tools.lock
	@touch $@

# Exact versions and hashes of all that a server or client needs, within constraints.txt. PyTorch is not among it: only
# training and folding need it, and which build is right depends on the machine.
lock: tools
	$(TOOLS)/bin/uv pip compile deploy/requirements.in --constraints constraints.txt $(LOCKING) -o requirements.lock
	$(TOOLS)/bin/uv pip compile deploy/tools.in $(LOCKING) -o deploy/tools.lock

# A list of the parts in requirements.lock, CycloneDX 1.6.
sbom: tools
	@mkdir -p dist
	# The tool takes a version that is written out; ours stands in the package.
	sed 's/^dynamic = \["version"\]/version = "$(VERSION)"/' pyproject.toml > dist/pyproject.toml
	SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) $(TOOLS)/bin/cyclonedx-py requirements requirements.lock \
		--pyproject dist/pyproject.toml --output-reproducible --output-file dist/entropi.cdx.json

# Of the last commit, whatever lies in the folder; the same bytes whoever builds it.
wheel: tools
	rm -rf dist/source && mkdir -p dist/source
	git -c tar.umask=0022 archive HEAD | tar -x -C dist/source
	umask 022 && SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) $(TOOLS)/bin/python -m build --wheel --no-isolation --outdir dist dist/source
	rm -rf dist/source

format: install
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf $(VENV) $(TOOLS) .venv-versions runs build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
