# Every verb sets up .venv by itself. Needed: Python 3.11 to 3.13 with pip and venv, make, git.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= 8000
BIN := .venv/bin
SNAKEMAKE = $(BIN)/python -m snakemake --snakefile workflow/Snakefile --profile workflow/profiles/local
INDEX := _build/html/index.html

.DEFAULT_GOAL := help
.PHONY: help book rebook study quick test test-all lint bench calibrate serve clean

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

book: .venv/.installed  ## execute the chapters that are stale, build the HTML
	@$(SNAKEMAKE) all
	@echo "The book: $(CURDIR)/$(INDEX)"

rebook: .venv/.installed  ## execute every chapter and invert every latent again, build the HTML
	@$(SNAKEMAKE) all --forceall --config rebook=1
	@echo "The book: $(CURDIR)/$(INDEX)"

study: .venv/.installed  ## measure every model on every domain; hours, goes on where it was stopped
	@for table in gaussianity separability geometry differences; do $(BIN)/ood study $$table || exit; done

quick: .venv/.installed  ## run every chapter at the scale "quick" into runs/chapters
	@$(SNAKEMAKE) quick

test: .venv/.installed  ## run the tests that take seconds
	@$(BIN)/python -m pytest -m "not slow"

test-all: .venv/.installed  ## run all tests
	@$(BIN)/python -m pytest

lint: .venv/.installed  ## check style and formatting
	@$(BIN)/ruff check ood_lib tests notebooks benchmarks
	@$(BIN)/ruff format --check ood_lib tests notebooks benchmarks

bench: .venv/.installed  ## time inversion against other software; keep the machine quiet
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt \
		|| echo "azula could not be installed; the run goes on without it" >&2
	@$(BIN)/python benchmarks/inversion.py

calibrate: .venv/.installed  ## simulate the null tables and the size and power of every test
	@$(BIN)/python benchmarks/calibrate.py

serve:  ## serve the book that `make book` built
	@test -f $(INDEX) || { echo "there is no book yet: run make book" >&2; exit 1; }
	@$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory $(dir $(INDEX))

clean:  ## remove the HTML and the state of the workflow; trained models and latents stay
	@rm -rf _build .snakemake runs/stamps runs/chapters runs/failed

.venv/.installed: requirements.lock pyproject.toml
	@echo "Setting up .venv with $(PYTHON); the download takes minutes"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
