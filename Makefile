# Everything sets itself up: a virtual environment, torch, the C++ extension. Needs Python >= 3.10 and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP_ARGS ?=
TORCH_STAMP = $(VENV)/.$(subst =,_,$(firstword $(TORCH)))
RESULTS := $(if $(filter undefined,$(origin OUT)),benchmarks/results,$(OUT))
OUT ?= demo_out

.PHONY: demo studio test cuda lint docs bench gpu-check gpu-library clean

demo: $(VENV)/.installed
	$(VENV)/bin/rewrite demo --out $(OUT)

# The page that edits are drawn in, on the embedded generator.
studio: $(VENV)/.installed
	$(VENV)/bin/rewrite studio

# Side by side; passive, as OpenMP's spinning threads would take the others' cores.
test: $(VENV)/.installed
	OMP_WAIT_POLICY=passive $(VENV)/bin/pytest -n auto --maxprocesses 4 --dist worksteal $(TESTS)
	@command -v nvcc >/dev/null || echo "Not compiled by nvcc, which is not here: csrc/*.cu (make cuda)."

# csrc/*.cu by nvcc for each architecture: registers, spills, instructions. Needs no GPU; says so where there is no nvcc.
cuda: $(VENV)/.installed
	$(VENV)/bin/pytest -rs -m slow -k 'kernels_fit or tensor_cores' tests/test_spd_solve_cuda.py tests/test_fit_projected_cuda.py

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

# In stages (benchmarks/README.md). Without an NVIDIA GPU it ends before anything is built. TORCH and PIP_ARGS choose a
# torch to download; with SYSTEM=1 everything is PYTHON's own, nothing is downloaded, and the library in .system is used
# where it fits. `make gpu-library` only builds that, with or without a GPU. OUT is where results go, MINUTES how
# long the stages may take (5), STAGES which of them run, RESUME a file of lines of an earlier run.
GPU_FLAGS = $(if $(MINUTES),--minutes $(MINUTES)) $(if $(STAGES),--stages '$(STAGES)') $(if $(RESUME),--resume '$(RESUME)')
SYSTEM_LIBRARY := .system

gpu-check gpu-library: export PYTHONSAFEPATH =
gpu-check: export REWRITE_CORE_CUDA := $(if $(shell command -v $${CUDACXX:-nvcc}),1,)
gpu-check:
ifdef SYSTEM
	@$(PYTHON) -m benchmarks.gpu --system '$(SYSTEM_LIBRARY)' --out '$(RESULTS)' $(GPU_FLAGS)
else
	@$(PYTHON) -m benchmarks.gpu --look
	@$(MAKE) --no-print-directory $(VENV)/.installed
	@$(VENV)/bin/python -m benchmarks.gpu --out '$(RESULTS)' $(GPU_FLAGS)
endif

gpu-library:
	@$(PYTHON) -m benchmarks.gpu --build --system '$(SYSTEM_LIBRARY)'

$(TORCH_STAMP):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "rewrite_core needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(PIP_ARGS) '$(TORCH)'
	touch $@

# The checkout itself: Python files need no installing again, compiled ones do.
$(VENV)/.installed: $(TORCH_STAMP) setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(VENV)/bin/pip install --quiet $(PIP_ARGS) -e '.[test]'
	touch $@

# What the extras dev and docs name; the package itself is there already.
TOOLS = import importlib.metadata as m; print(*[r.split(";")[0] for r in m.requires("rewrite_core") if r.endswith(("\"dev\"", "\"docs\""))])
$(VENV)/.tools: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet $(PIP_ARGS) $$($(VENV)/bin/python -c '$(TOOLS)')
	touch $@

clean:
	rm -rf $(VENV) $(SYSTEM_LIBRARY) build demo_out bench_out site *.egg-info
