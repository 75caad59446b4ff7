# Everything runs inside .venv; only Python >= 3.11 (with venv), make and a package index are needed.
#   make demo     restore the example photos, offline, and print where the pictures are
#   make test     run the tests
#   make test-ray run the tests of folders on a real Ray cluster of this machine
#   make test-web run the tests of the web page in a real Chromium; installs one where it can
#   make docs     build the documentation site into site/, strictly, and check it
#   make package  build sdist and wheel into dist/, install both into a clean environment, and restore with them
# Variables: PYTHON (the interpreter that builds .venv), PIP_ARGS (e.g. another index), TESTARGS (passed to pytest).

PYTHON   ?= python3
VENV     := .venv
BIN      := $(VENV)/bin
STAMP    := $(VENV)/.installed
PIP_ARGS ?=
TESTARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PYTHONUNBUFFERED = 1

.PHONY: setup demo test test-ray test-web browser lint types imports check docs package clean

setup: $(STAMP)

# One stamp stands for "installed as pyproject.toml and constraints.txt say": a second `make` installs nothing.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, and $(PYTHON) is {v[0]}.{v[1]}; name another one: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(TESTARGS)

# Playwright drives the system's own Chromium, so no browser is downloaded past the package manager.
browser:
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; \
	else \
	    echo "The tests of the web page need Chromium; install it, for instance: sudo apt-get install chromium" >&2; exit 1; \
	fi

test-ray: setup
	$(BIN)/python -m pytest -m ray tests/cli/test_batch_ray.py -n 0 $(TESTARGS)

test-web: setup browser
	$(BIN)/python -m pytest -m web tests/web --numprocesses 2 --dist loadfile $(TESTARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: setup
	$(BIN)/lint-imports

check: test test-ray test-web lint types imports

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs --quiet build --strict
	$(BIN)/python tools/check_site.py site
	$(BIN)/python -m pytest --quiet -m slow tests/unit/test_site.py

package: setup
	rm -rf dist
	PIP_QUIET=1 $(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tools/check_package.py dist --install --pip '$(PIP_ARGS)'

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
