# Everything sets itself up: a virtual environment, torch, the C++ extension. Needs Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_ARGS ?=
OUT ?= demo_out

SOURCES := $(shell find rewrite_core kernels csrc benchmarks -type f -not -path '*/__pycache__/*' -not -path '*/results/*')

.PHONY: demo test bench gpu-check clean

demo: $(VENV)/.installed
	$(VENV)/bin/rewrite demo --out $(OUT)

test: $(VENV)/.installed
	$(VENV)/bin/pytest $(TESTS)

bench: $(VENV)/.installed
	$(VENV)/bin/rewrite bench all

# Needs an NVIDIA GPU and a torch that sees it (TORCH, PIP_ARGS). csrc/*.cu are compiled where there are any.
gpu-check: export REWRITE_CORE_CUDA := $(if $(wildcard csrc/*.cu),1,)
gpu-check: $(VENV)/.installed
	$(VENV)/bin/python -m rewrite_core.benchmarks.gpu_check --out benchmarks/results

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "rewrite_core needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(PIP_ARGS) '$(TORCH)'
	touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py pyproject.toml CMakeLists.txt rewrite_core_command.py $(SOURCES)
	$(VENV)/bin/pip install --quiet $(PIP_ARGS) '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build demo_out bench_out *.egg-info
