# README and .ci/run call these targets and nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint type bench-smoke docs dist

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
# torchvision asks for the very torch it was built for; what else it needs (numpy, pillow) matplotlib has brought
	$(BIN)/pip install --quiet -c constraints.txt --no-deps torchvision
	touch $@

quickstart: .venv/installed
	$(BIN)/python examples/02_compress.py --out quickstart_out $(ARGS)

# Two workers of one thread each. A file stays with one of them, since its models are shared; tests/conftest.py has the
# order of files, which xdist would replace by its own.
test: lint type
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --config setup.cfg
# docstrings and error messages: every parameter, keyword and call that they name is in a signature
	$(BIN)/python -m pytest -q tests/test_docstrings.py

type: .venv/installed
	$(BIN)/mypy

bench-smoke: .venv/installed
	$(BIN)/python -m pytest tests/test_benchmarks.py

.venv/installed-docs: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

# The site, in build/docs. Any warning is an error. The variable silences the theme's notice of the end of MkDocs 1.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# The source distribution, and the wheel that is built from it, in dist/.
dist: .venv/installed
	$(BIN)/python -m build
