# A front door and nothing more: demo and test set up .venv with nox in it and call nox (see noxfile.py, `nox -l`).
PYTHON ?= python3
VENV := .venv
ARGS ?=

.PHONY: help demo gpu test
help:
	@echo "make demo   train example 00 on the CPU and plot it; more options: make demo ARGS=\"--seed 1\""
	@echo "make test   run everything that CI runs"
	@echo "make gpu    run what needs a CUDA device: tests and kernel benchmarks, with the torch that $(PYTHON) has"
	@echo "Another Python: make test PYTHON=python3.12"

demo: $(VENV)/.nox-ready
	@$(VENV)/bin/nox -s demo -- $(ARGS)

test: $(VENV)/.nox-ready
	@$(VENV)/bin/nox

# No nox and no environment: a machine with a GPU has its own torch.
gpu:
	@$(PYTHON) tests/gpu.py $(ARGS)

$(VENV)/.nox-ready: constraints/ci.txt
	@command -v $(PYTHON) >/dev/null || { echo "No '$(PYTHON)' found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) -V) is too old: Python 3.11 or newer is needed; name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "'$(PYTHON)' cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "Setting up $(VENV) with nox ..."
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet -c constraints/ci.txt nox
	@touch $@
