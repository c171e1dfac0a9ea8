# A fresh machine needs python3.11 and make; everything else goes into .venv.
PYTHON ?= python3.11
BIN := .venv/bin
unexport PYTHONDONTWRITEBYTECODE  # some thirty interpreters start in the tests: each would compile torch anew
BENCHES := core attribution stability families quality speed moe large shape report written measured front lean fit circuits correction
RUNS := .venv/.runs
INSTALLED := .venv/.installed

DOCUMENTED := .venv/.documented
BROWSED := .venv/.browsed

.PHONY: demo test slow thorough sweep fuzz check static docs examples browser bench clean

demo: $(RUNS)  ## prune a small model end to end on this machine
	$(BIN)/causalprune demo

test: $(INSTALLED)  ## the tests, but for those that take minutes
	$(BIN)/pytest -q -n auto --dist loadgroup

slow: $(INSTALLED)  ## the tests that take minutes
	$(BIN)/pytest -q -m slow

thorough: $(INSTALLED)  ## of those, the ones that take seconds each, which CI runs too (minutes)
	$(BIN)/pytest -q -m thorough -n auto --dist loadgroup

fuzz: $(INSTALLED)  ## 10,000 cases of every kind of broken file (minutes)
	CAUSALPRUNE_FUZZ=10000 $(BIN)/pytest -q -n auto --dist loadgroup tests/test_fuzz.py

docs: $(DOCUMENTED)  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

examples: $(DOCUMENTED)  ## run the notebook, every command that the documentation shows, and the wheel alone
	$(BIN)/pytest -q -m slow -n auto tests/test_commands.py tests/test_notebook.py tests/test_wheel.py

browser: $(BROWSED)  ## the report in Chromium, which has to be on this machine
	$(BIN)/pytest -q -m slow tests/reports/test_report_browser.py

check: static test docs  ## everything that must hold before a commit; wings and line budget are tests

static: $(INSTALLED)  ## format, lint, types and bandit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file bench/mypy.ini
	$(BIN)/bandit -q -r src -c pyproject.toml

sweep: $(INSTALLED)  ## every type of model that transformers knows, tiny, from end to end (ten minutes to an hour)
	$(BIN)/python bench/families.py sweep

bench: $(INSTALLED)  ## all measurements, one after the other (many hours; what is finished is kept)
	set -e; for name in $(BENCHES); do echo "== $$name"; $(BIN)/python bench/$$name.py; done

$(RUNS): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[demo]'
	touch $@

$(INSTALLED): $(RUNS)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev,demo]'
	touch $@

$(DOCUMENTED): $(INSTALLED)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[docs]'
	touch $@

$(BROWSED): $(INSTALLED)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[browser]'
	touch $@

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
