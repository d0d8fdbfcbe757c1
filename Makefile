# Everything sets itself up: a virtual environment, torch, the C++ extension. Needs Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_ARGS ?=
TORCH_STAMP = $(VENV)/.$(subst =,_,$(firstword $(TORCH)))
RESULTS := $(if $(filter undefined,$(origin OUT)),benchmarks/results,$(OUT))
OUT ?= demo_out

SOURCES := $(shell find rewrite_core kernels csrc benchmarks -type f -not -path '*/__pycache__/*' -not -path '*/results/*')

.PHONY: demo studio test lint docs bench gpu-check clean

demo: $(VENV)/.installed
	$(VENV)/bin/rewrite demo --out $(OUT)

# The page that edits are drawn in, on the embedded generator.
studio: $(VENV)/.installed
	$(VENV)/bin/rewrite studio

# Side by side; passive, as OpenMP's spinning threads would take the others' cores.
test: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(VENV)/bin/pytest -n auto --maxprocesses 4 --dist worksteal $(TESTS)

# mypy reads the package, kernels/ and benchmarks/ with it; its settings and ruff's are in pyproject.toml.
lint: $(VENV)/.tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(shell find csrc tests/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	$(VENV)/bin/mypy

# The site, in site/; a warning is an error. `make docs SERVE=1` shows it at http://127.0.0.1:8000 and follows changes.
docs: $(VENV)/.tools
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs $(if $(SERVE),serve,build) --strict

bench: $(VENV)/.installed
	$(VENV)/bin/rewrite bench all

# Needs an NVIDIA GPU and a torch that sees it: TORCH and PIP_ARGS choose one to download. With SYSTEM=1 everything is
# PYTHON's own, and nothing is downloaded. OUT is where results go, MINUTES how long it may take (8).
# csrc/*.cu are compiled where there are any. sys.path: not the checkout, where nothing is compiled.
SYSTEM_LIBRARY := .system
NEEDED := torch triton numpy safetensors PIL tqdm matplotlib xxhash pytest pip setuptools pybind11
define SYSTEM_CHECK
import importlib.metadata, importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if "setuptools" not in missing and int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
    missing.append("setuptools 77 or newer")
if missing:
    sys.exit(f"make gpu-check SYSTEM=1 needs what {sys.executable} lacks: {', '.join(missing)}.")
endef
export SYSTEM_CHECK

ifdef SYSTEM
GPU_CHECK := $(SYSTEM_LIBRARY)
GPU_PYTHON := $(PYTHON)
else
GPU_CHECK := $(VENV)
GPU_PYTHON := $(VENV)/bin/python
endif

gpu-check: export REWRITE_CORE_CUDA := $(if $(wildcard csrc/*.cu),1,)
gpu-check: $(GPU_CHECK)/.installed
	$(GPU_PYTHON) -c 'import sys; sys.path[0] = "$(abspath $(GPU_CHECK))"; from rewrite_core.benchmarks.gpu_check import main; sys.exit(main())' --out '$(RESULTS)' $(if $(MINUTES),--minutes $(MINUTES))

$(SYSTEM_LIBRARY)/.installed: setup.py pyproject.toml CMakeLists.txt $(SOURCES)
	@$(PYTHON) -c "$$SYSTEM_CHECK" $(NEEDED)
	rm -rf $(SYSTEM_LIBRARY)
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --no-index --target $(SYSTEM_LIBRARY) .
	touch $@

$(TORCH_STAMP):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "rewrite_core needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(PIP_ARGS) '$(TORCH)'
	touch $@

# The checkout itself: Python files need no installing again, compiled ones do.
$(VENV)/.installed: $(TORCH_STAMP) setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(VENV)/bin/pip install --quiet $(PIP_ARGS) -e '.[test]'
	touch $@

# What the extras dev and docs name; the package itself is there already.
TOOLS = import importlib.metadata as m; print(*[r.split(";")[0] for r in m.requires("rewrite_core") if r.endswith(("\"dev\"", "\"docs\""))])
$(VENV)/.tools: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet $(PIP_ARGS) $$($(VENV)/bin/python -c '$(TOOLS)')
	touch $@

clean:
	rm -rf $(VENV) $(SYSTEM_LIBRARY) build demo_out bench_out site *.egg-info
