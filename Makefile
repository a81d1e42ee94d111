# `src/environment.sh` prints the path of the python to use; the first call makes the environment.
PYTHON = python="$$(src/environment.sh --dev)" && "$$python"
# A process that a hung test ended (pyproject.toml) is replaced once, not for ever.
PARALLEL = --dist loadfile --no-loadscope-reorder --max-worker-restart 1
SCRIPTS = $(wildcard *.sh src/*.sh) .ci/run docs/slurm/train.sbatch docs/deploy/completion.bash

.PHONY: help environment test test-slow soak gpu-check docs links repository screenshots lock lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile

environment: ## make or complete the Python environment
	@src/environment.sh --dev

test: lint ## lint, then the tests but for the slow ones: under 10 minutes on 2 cores
	@$(PYTHON) -m pytest -m "not slow" --numprocesses auto $(PARALLEL)

# One worker more than cores: these tests often wait, for a rank that says nothing or for a process to end.
test-slow: environment ## the tests that take long; CI runs them too
	@$(PYTHON) -m pytest -m slow --numprocesses "$$("$$python" -c 'import os; print(os.cpu_count() + 1)')" $(PARALLEL)

MINUTES ?= 30
soak: environment ## kill and restart a run at random moments for MINUTES=30
	@$(PYTHON) benchmarks/soak.py --minutes $(MINUTES)

gpu-check: environment ## is this GPU right, and as fast as it should be? nine minutes; docs/speed.md
	@$(PYTHON) benchmarks/gpu_check.py

docs: environment ## build the static site into temp_data/site; at first it executes the notebooks, for minutes
	@$(PYTHON) docs/site/notebook_pages.py
	@export NO_MKDOCS_2_WARNING=1; $(PYTHON) -m mkdocs build --quiet --strict --config-file docs/site/mkdocs.yml
	@echo "temp_data/site/index.html; with search: python -m http.server --directory temp_data/site"

links: docs ## visit what the pages link to on other sites; needs uv and the network
	@uvx linkchecker --check-extern --no-warnings temp_data/site/index.html

repository: ## write the address of your fork where the notebooks look: make repository URL=https://github.com/ACCOUNT/NAME
	@test -n "$(URL)" || { echo "missing URL: make repository URL=https://github.com/ACCOUNT/NAME"; exit 2; }
	@old="$$(sed -n 's/^Repository = "\(.*\)"$$/\1/p' pyproject.toml)"; git grep -lzF "$$old" -- pyproject.toml notebooks | \
		OLD="$$old" NEW="$(URL)" xargs -0 perl -pi -e 's/\Q$$ENV{OLD}\E/$$ENV{NEW}/g'

screenshots: environment ## draw the pictures of README.md and docs/, of the run `debug`; needs Chromium
	@$(PYTHON) docs/screenshots.py

lock: ## renew docs/deploy/requirements.lock after a change of requirements.txt; needs uv
	@uv pip compile requirements.txt --universal --python-version 3.11 --generate-hashes --quiet \
		--no-annotate --no-header --output-file docs/deploy/requirements.lock

lint: environment ## check style, types and imports: Python and shell
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@python="$$(src/environment.sh --dev)" && "$$(dirname "$$python")/lint-imports" --no-logo --no-cache
	@python="$$(src/environment.sh --dev)" && "$$(dirname "$$python")/shellcheck" $(SCRIPTS)

format: environment ## rewrite the Python files in the project's style
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

clean: ## remove caches; never data, runs or the environment
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name '.venv*' -prune -o -name temp_data -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
