# `src/environment.sh` prints the path of the python to use; the first call makes the environment.
PYTHON = python="$$(src/environment.sh --dev)" && "$$python"
SCRIPTS = $(wildcard *.sh src/*.sh) .ci/run

.PHONY: help environment test lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

environment: ## make or complete the Python environment
	@src/environment.sh --dev

test: lint ## everything that CI runs: lint, then the tests
	@$(PYTHON) -m pytest --numprocesses auto --dist loadfile --max-worker-restart 1

lint: environment ## check style: Python and shell
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@python="$$(src/environment.sh --dev)" && "$$(dirname "$$python")/shellcheck" $(SCRIPTS)

format: environment ## rewrite the Python files in the project's style
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

clean: ## remove caches; never data, runs or the environment
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name '.venv*' -prune -o -name temp_data -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
