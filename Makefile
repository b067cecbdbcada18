# `make demo` and `make test` do all their set-up themselves, in .venv. Another Python: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench clean
.NOTPARALLEL:

demo: .venv/.examples
	$(BIN)/python examples/train_packed.py

# The scripts use the active environment if there is one; make always means .venv, which they set up by .venv/.%.
test:
	VIRTUAL_ENV= scripts/test

check:
	VIRTUAL_ENV= scripts/check

bench: .venv/.bench
	$(BIN)/python benchmarks/bench_cpu.py

# A stamp for each set of extras: installed again only when the requirements change.
.venv/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[$*]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "flexattn needs Python 3.10 or newer, and '$(PYTHON)' is not. Name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "'$(PYTHON)' cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache examples/out
