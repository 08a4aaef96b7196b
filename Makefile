# fewstep: every target creates .venv and installs what it needs. Needs Python 3.11+ and make, nothing else.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
SLOTS ?= 2

# Packages are large (the ordinary torch wheel): be patient with slow networks.
export UV_HTTP_TIMEOUT ?= 300
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# uv installs into our environment, also when another one is active in the shell.
unexport CONDA_PREFIX
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
# Without its bytecode torch takes half a minute to import, in every cell of a grid.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo results test test-slow test-slurm compare lint install lock clean clean-runs clean-all

help:
	@echo "fewstep: few-step distillation of diffusion models"
	@echo
	@echo "  make demo        run a real ablation grid on the embedded teacher; show its table, figure and report"
	@echo "                   (SLOTS=$(SLOTS) cells at a time)"
	@echo "  make results     rebuild every table and figure from the committed records, to out/results"
	@echo "  make test        run the test suite (WORKERS=$(WORKERS) processes)"
	@echo "  make test-slow   run the tests that take half a minute or more each"
	@echo "  make test-slurm  run the tests that need a SLURM; installs it from Debian's packages (as root)"
	@echo "  make compare BASE=REVISION  does the working tree compute what a revision did? golden curves, all experiments"
	@echo "  make lint        check style and layering"
	@echo "  make install     create $(VENV) and install the locked requirements (the targets above do it themselves)"
	@echo "  make lock        resolve requirements.lock again from pyproject.toml (keeps versions that still fit)"
	@echo "  make clean       remove tool caches and built reports; clean-runs: also runs/ and .cache/; clean-all: also $(VENV)"

install: $(STAMP)

# The installer itself comes from requirements.lock: its version and hashes are cut out of it for pip.
$(STAMP): requirements.lock pyproject.toml
	@python=$${PYTHON:-}; \
	for candidate in $$python python3 python3.14 python3.13 python3.12 python3.11; do \
	  $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$$candidate && break; \
	  python=; \
	done; \
	if [ -z "$$python" ]; then echo "error: fewstep needs Python 3.11 or newer (set PYTHON=...)" >&2; exit 1; fi; \
	if ! $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("uv") or u.find_spec("pip")))' \
	    2>/dev/null; then \
	  echo "Creating $(VENV) with $$($$python --version)"; \
	  $$python -m venv --clear $(VENV) || exit 1; \
	fi
	@if ! $(BIN)/uv --version >/dev/null 2>&1; then \
	  sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > $(VENV)/uv.lock && \
	  $(BIN)/python -m pip install --quiet --require-hashes -r $(VENV)/uv.lock; \
	fi
	@echo "Installing the locked requirements (the first time this downloads about 3 GB on Linux)"
	@$(BIN)/uv pip sync --quiet --require-hashes --build-constraint requirements.lock requirements.lock
	@$(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

DEMO := flash_losses
DEMO_OPTIONS := --scale emoji --budget demo

demo: $(STAMP)
	@$(BIN)/fewstep grid run $(DEMO) $(DEMO_OPTIONS) --slots $(SLOTS)
	@$(BIN)/fewstep report $(DEMO) $(DEMO_OPTIONS)

results: $(STAMP)
	@$(BIN)/fewstep results

test: $(STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: $(STAMP)
	@$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist loadfile

SLURM_PACKAGES := slurm-wlm munge slurmdbd mariadb-server

test-slurm: $(STAMP)
	@if ! command -v slurmctld >/dev/null || ! command -v mariadbd >/dev/null; then \
	  if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "error: a real SLURM is needed: as root, apt-get install -y $(SLURM_PACKAGES)" >&2; exit 1; \
	  fi; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(SLURM_PACKAGES) >/dev/null || exit 1; \
	fi
	@$(BIN)/python -m pytest -m slurm -n $(WORKERS) --dist loadfile tests/slurm

BASE ?= HEAD~1

compare: $(STAMP)
	@$(BIN)/python -m tests.compare $(BASE)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-logo

LOCKED_EXTRAS := --extra tensorboard --extra lpips --extra dev

lock: $(STAMP)
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 $(LOCKED_EXTRAS) --generate-hashes \
	  --no-annotate --no-header pyproject.toml --output-file requirements.lock

clean:
	@rm -rf out .pytest_cache .ruff_cache .import_linter_cache build dist
	@find core experiments ablations analysis slurm tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-runs: clean
	@rm -rf runs .cache

clean-all: clean-runs
	@rm -rf $(VENV)
