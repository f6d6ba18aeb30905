# make demo: the whole loop on the bundled model. make test: every check and test. Both set up what they need.
# Needs python3.11 (another: PYTHON=python3.12 make ...) and make; packages come from where pip is configured to look.

PYTHON ?= python3.11
BIN := .venv/bin
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: help setup demo test check bench browser oracle vllm test-load pins clean

help:
	@grep -E '^# |^[a-z-]+:.*## ' Makefile | sed -E 's/^# //; s/:.*## /: /'

setup: ## make .venv, or repair it; nothing to do the second time
	@$(PYTHON) constraints/environment.py

demo: setup ## the whole loop on the bundled model; leaves demo/report.html
	@$(BIN)/steer demo

# The environments are made beside each other and beside the checks; each says its name when it says something.
test: ## every check and every test lane
	@$(MAKE) --no-print-directory --jobs=2 setup vllm
	@$(MAKE) --no-print-directory --jobs=2 check browser oracle
	@$(BIN)/python -m pytest -n 2 --dist worksteal

check: setup ## style, types, import rules
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "some files are not formatted: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo 

bench: setup ## the numbers of docs/status.md, as JSON
	@for program in startup span_means probes experts steered_generation replies edits; do $(BIN)/python -m benchmarks.$$program || exit 1; done

# The browser lane looks at the report. As root a missing browser is installed once; else the lane says why it is skipped.
browser: setup
	@$(BIN)/python constraints/browser.py

# The tests of merging compare with mergekit, in an environment of its own; where it cannot be had they say so.
oracle: setup
	@$(PYTHON) constraints/oracle.py

# Steering in vLLM is tested with vLLM built for processors, again in an environment of its own that reads .venv.
vllm:
	@$(PYTHON) constraints/vllm.py

test-load: setup vllm ## steer serve under 64 clients for two minutes; ten seconds of it are part of make test
	@STEER_LOAD_SECONDS=120 $(BIN)/python -m pytest tests/vllm/test_load.py

pins: ## write what .venv holds into constraints/cpu.txt
	@$(BIN)/python constraints/pins.py

clean: ## remove everything that make has made
	rm -rf .venv .venv-oracle .venv-vllm demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
