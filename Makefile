PYTHON ?= python3
PRESET ?= smoke
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary=:all:

.DEFAULT_GOAL := help
.PHONY: help run test lab new render canon readme badges lint bench data clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'
	@echo '  NB=07 one notebook · PRESET=smoke|cpu|gpu · SEED=3 · PARAMS="NAME=VALUE ..." further notebook parameters'

$(VENV)/run.stamp: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11, 4) else "Python 3.11.4 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing requirements.txt into $(VENV), once (a few minutes, a few GB)'
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp tests/requirements.txt
	@$(PIP) -r tests/requirements.txt
	@touch $@

run: $(VENV)/run.stamp  ## execute every notebook (default PRESET=smoke) into runs/ and say what came of it
	@$(BIN)/python -m tools.run $(if $(NB),--nb $(NB)) --preset $(PRESET) $(if $(SEED),--seed $(SEED)) $(PARAMS)

test: $(VENV)/test.stamp  ## run all tests, on all cores
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

lab: $(VENV)/run.stamp  ## install JupyterLab and open the notebooks in it
	@test -x $(BIN)/jupyter-lab || $(PIP) jupyterlab==4.6.6
	@$(BIN)/jupyter lab --notebook-dir=notebooks

new: $(VENV)/run.stamp  ## NB=16 NAME=weight_averaging: begin a notebook
	@$(BIN)/python -m tools.new --nb $(NB) --name $(NAME)

render: $(VENV)/run.stamp  ## execute notebooks in place, with PRESET=cpu or gpu, and update README and img/
	@$(BIN)/python -m tools.render $(if $(NB),--nb $(NB)) --preset $(PRESET) $(ARGS)

canon: $(VENV)/run.stamp  ## copy the canon blocks of tools/canon into the notebooks
	@$(BIN)/python -m tools.sync_canon

readme: $(VENV)/run.stamp  ## write the README's gallery from the notebooks' metadata
	@$(BIN)/python -m tools.readme

badges: $(VENV)/run.stamp  ## REPO=owner/name: point badges and links to another GitHub repository
	@$(BIN)/python -m tools.readme --repository $(REPO)

lint: $(VENV)/test.stamp  ## run the linter and the formatter's check
	@$(BIN)/ruff check . && $(BIN)/ruff format --check tests tools

bench: $(VENV)/test.stamp  ## measure speed and memory, never part of the tests; NB=07 ARGS=--sweep for one notebook
	@for script in tools/bench/$(or $(NB),[0-9][0-9]).py; do \
	  name=$$(basename $$script .py); \
	  echo "== $$name" && $(BIN)/python -m tools.bench.$$name $(ARGS) || exit 1; \
	done

data: $(VENV)/run.stamp  ## FULL=folder: cut the embedded subsets in data/ out of the full data sets
	@$(BIN)/python -m tools.make_data $(FULL)

clean:  ## delete the virtual environment and runs/
	@rm -rf $(VENV) runs
