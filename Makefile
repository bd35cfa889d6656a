# make course | make test | make lab
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed

.PHONY: course test lab clean

course: $(STAMP)
	@$(BIN)/medquad run --profile tiny

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check medquad_utils tests
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir=notebooks --MappingKernelManager.transport_encryption=auto

# The versions that were tested come from environment.yml; torch first, so that nothing pulls another one in.
$(STAMP): pyproject.toml environment.yml
	@echo 'Installing the tested versions into $(VENV) (some minutes, once) ...'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@sed -n 's/^ *- \([a-z0-9-]*==[^ ]*\).*/\1/p' environment.yml > $(VENV)/constraints.txt
	@$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt torch
	@$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[test]'
	@touch $(STAMP)

clean:
	rm -rf runs build *.egg-info
