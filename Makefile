# A fresh machine needs python3.11 and make; everything else goes into .venv.
PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test slow fuzz check static bench clean

demo: $(INSTALLED)  ## prune a small model end to end on this machine
	$(BIN)/causalprune demo

test: $(INSTALLED)  ## the tests, but for those that take minutes
	$(BIN)/pytest -q -n auto --dist loadgroup

slow: $(INSTALLED)  ## the tests that take minutes
	$(BIN)/pytest -q -m slow

fuzz: $(INSTALLED)  ## 10,000 cases of every kind of broken file (minutes)
	CAUSALPRUNE_FUZZ=10000 $(BIN)/pytest -q -n auto --dist loadgroup tests/test_fuzz.py

check: static test  ## everything that must hold before a commit; layers and line budget are tests

static: $(INSTALLED)  ## format, lint, types and bandit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/bandit -q -r src -c pyproject.toml

bench: $(INSTALLED)  ## run the benchmarks, one after the other
	set -e; for script in $(filter-out %/common.py bench/tables.py bench/faults.py bench/cluster.py bench/tuning.py bench/consumers.py,$(wildcard bench/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev,demo]'
	touch $@

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
