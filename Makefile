# Every command that people and CI run. `make help` lists them.
# Each step of the installation leaves a stamp in .venv, so that what is done is not done again.

VENV ?= .venv
PYTHON ?=
TORCH_BUILD ?= auto
PROMPT ?= a small red circle moves to the right on a blue background
OUTPUT ?= outputs/demo.mp4

python := $(VENV)/bin/python
code := $(wildcard src tests training benchmarks scripts)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHON PROMPT  # to the recipes by environment, so that quotes in a prompt do no harm

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv install demo test check lint pytest test-gpu format lock clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo "Settings: PYTHON=python3.12  TORCH_BUILD=auto|cpu|gpu  PROMPT='...'  OUTPUT=clip.mp4"

venv: $(VENV)/.made  ## make the virtual environment (.venv), nothing in it yet
install: $(VENV)/.runtime  ## the same, and install wanfit into it

demo: $(VENV)/.runtime  ## a clip from a prompt with the demo model, and its frames as one PNG
	@printf 'wanfit generate "%s"\n' "$$PROMPT"
	@$(VENV)/bin/wanfit generate "$$PROMPT" --output "$(OUTPUT)" --contact-sheet

test: lint pytest  ## everything that CI runs: lint, types, import layers, tests
check: test  ## another name for `make test`

lint: $(VENV)/.dev  ## ruff, mypy and import-linter only
	$(python) -m ruff check $(code)
	$(python) -m ruff format --check $(code)
	$(python) -m mypy $(code)
	$(VENV)/bin/lint-imports

pytest: $(VENV)/.dev  ## the tests only, those that need no GPU
	$(python) -m pytest -m "not gpu" --numprocesses auto

test-gpu: $(VENV)/.dev  ## the tests that need an NVIDIA GPU
	$(python) -m pytest -m gpu

format: $(VENV)/.dev  ## rewrite the code the way that `make lint` wants it
	$(python) -m ruff check --fix $(code)
	$(python) -m ruff format $(code)

lock:  ## write constraints.txt anew, from the newest releases that pyproject.toml admits
	scripts/lock.sh constraints.txt

clean:  ## remove .venv, caches and build leftovers; outputs/ stays
	rm -rf "$(VENV)" build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(code) -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made: scripts/make_venv.sh
	scripts/make_venv.sh "$(VENV)"
	@touch $@

# The torch that install_torch.py chose stays: the constraints for the rest do not name it.
$(VENV)/.torch: $(VENV)/.made scripts/install_torch.py constraints.txt
	$(python) scripts/install_torch.py --constraints constraints.txt --build "$(TORCH_BUILD)"
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	@touch $@

$(VENV)/.runtime: $(VENV)/.torch pyproject.toml
	@echo "Installing wanfit and what it needs."
	$(python) -m pip install --quiet --constraint $(VENV)/constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "Installing what the tests need (a minute or two)."
	$(python) -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[dev]"
	@touch $@
