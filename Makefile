# What the README names. Each makes its own virtual environment and needs nothing but Python 3.
PYTHON ?= python3
WORKERS ?= 2
PIP := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-long test-real lint docs dist clean

demo: .venv/demo/.installed
	.venv/demo/bin/python examples/demo.py

test: .venv/test/.installed lint
	.venv/test/bin/python -m pytest --numprocesses $(WORKERS)

# What make test leaves out; tests/README.md says what that is.
test-long: .venv/test/.installed
	.venv/test/bin/python -m pytest --numprocesses $(WORKERS) -m "long or real"

# A real model, downloaded to build/real at the first run. Its tests are skipped where it can't be downloaded.
test-real: .venv/test/.installed
	.venv/test/bin/python -m pytest -m "real and not long"

lint: .venv/test/.installed
	.venv/test/bin/ruff check .
	.venv/test/bin/ruff format --check .
	.venv/test/bin/mypy

docs: .venv/test/.installed
	.venv/test/bin/python -m sphinx -b html -c docs -d build/doctrees --fail-on-warning --keep-going . build/docs
	.venv/test/bin/python docs/check_links.py build/docs

# The sdist and the wheel of a release. The wheel is then installed alone, and opens what it must.
dist:
	$(PYTHON) -m venv --clear .venv/dist
	.venv/dist/bin/python $(PIP) hatchling
	rm -rf dist
	.venv/dist/bin/python -m hatchling build
	$(PYTHON) -m venv --clear .venv/dist
	.venv/dist/bin/python $(PIP) dist/*.whl
	cd dist && ../.venv/dist/bin/splitbundle verify ../tests/golden/v1.0/gpt2.splitbundle

# torch first and by its exact version: a loose requirement brings gigabytes of GPU packages.
.venv/demo/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv/demo
	.venv/demo/bin/python $(PIP) torch
	.venv/demo/bin/python $(PIP) --editable ".[convert]"
	touch $@

.venv/test/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv/test
	.venv/test/bin/python $(PIP) torch
	.venv/test/bin/python $(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
