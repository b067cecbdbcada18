# The two commands of the README do all their set-up themselves, in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench clean

demo: .venv/.examples
	$(BIN)/python examples/train_packed.py

test: .venv/.test
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/test

check: .venv/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

bench: .venv/.bench
	$(BIN)/python benchmarks/bench_cpu.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "flexattn needs Python 3.10 or newer; name one with: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "The venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }

# A stamp for each set of extras: installed again only when the requirements change.
.venv/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache examples/out
