# make course | make lab | make site | make real (hours) | make check (3 minutes) | make test (20 minutes) | make mutants | make weekly
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
# Two workers. A thread for each: more would fight for the two cores that this is planned for.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder
NEWEST := .venv-newest
# A clone of https://github.com/abachaa/MedQuAD
MEDQUAD ?= runs/MedQuAD

.PHONY: course lab site real check test mutants weekly clean

course: $(STAMP)
	@$(BIN)/medquad run --profile tiny

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir=notebooks --MappingKernelManager.transport_encryption=auto

# The committed notebooks and pages as a site with search, in build/site.
site: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --config-file .github/site/mkdocs.yml
	@echo 'build/site/index.html; with search: $(BIN)/python -m http.server -d build/site 8000'

# The weights of `small` and MedQuAD, once from the network; then a reference run of all lessons.
# `make real ROWS=2000` trains on as many rows as the profile takes at most, in twice the time.
ROWS ?= 1000

real: $(STAMP)
	@echo 'make real takes about three hours on two CPU cores, with $(ROWS) training rows; 1,000 took 2:46 hours.'
	@$(BIN)/medquad fetch small
	@$(BIN)/medquad fetch medquad
	@$(BIN)/medquad run --profile small -p rows=$(ROWS) --reference notebooks/reference/small

# At every change: form, types, and the tests that need no browser, no server and no second process.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check medquad_utils tests
	$(BIN)/mypy
	$(BIN)/deptry medquad_utils
	$(PYTEST) -m "not full"

# Before you push, and in CI: all of it, with the ten lessons executed once.
test: check
	$(PYTEST) -m full

# Each patch in tests/mutants is a mistake that the tests must notice.
mutants: $(STAMP)
	$(BIN)/python tests/mutants/run.py

# The newest release of every library, whatever the ranges say; then the ten lessons on real MedQuAD.
weekly:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	sed 's/==.*//; /^#/d' constraints.txt | xargs $(NEWEST)/bin/python -m pip install --quiet --upgrade
	$(NEWEST)/bin/python -m pip install --quiet --no-deps --editable .
	test -d $(MEDQUAD) || git clone --depth 1 https://github.com/abachaa/MedQuAD $(MEDQUAD)
	$(NEWEST)/bin/python -m pytest -q tests/test_signatures.py
	$(NEWEST)/bin/medquad run --profile tiny --runs runs/weekly \
	  -p source=xml -p data_path=$(MEDQUAD) -p rows=24 -p max_steps=12

# The tested version of every package; torch first, so that nothing pulls another one in.
$(STAMP): pyproject.toml constraints.txt
	@echo 'Installing the tested versions into $(VENV) (some minutes, once) ...'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $(STAMP)

clean:
	rm -rf runs build *.egg-info
