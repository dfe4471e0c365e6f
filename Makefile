# Every target makes its own .venv and installs what it needs; a second run finds the stamps and starts at once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= python3
TORCH ?= torch
WORKERS ?= 2
BIN := .venv/bin
# Releases known to work together; `make constraints` renews them.
CONSTRAINTS := requirements/constraints.txt
INSTALL := -m pip install --quiet --disable-pip-version-check

.PHONY: demo demo-digits test test-slow test-cycles test-newest test-oldest lint bench constraints clean help

demo: .venv/.stamp-demo .venv/.stamp-system  ## the paper's story on a small VGGT, on a CPU: a page in runs/demo
	$(BIN)/python examples/vggt/demo.py

demo-digits: .venv/.stamp-demo  ## the method on handwritten digits, on a CPU
	$(BIN)/python examples/digits.py

test: .venv/.stamp-dev .venv/.stamp-system  ## the tests, without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS)

test-slow: .venv/.stamp-dev .venv/.stamp-system .venv/.stamp-slurm .venv/.stamp-third-party test-cycles  ## the slow tests, and test-cycles
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(WORKERS) --timeout 1800

test-cycles: .venv-cycles/.stamp  ## the tests of both renderers of scenes, with Blender's bpy in a venv of its own
	.venv-cycles/bin/python -m pytest tests/scenes/test_cycles.py tests/scenes/test_raycast.py

test-newest: .venv/.stamp-system  ## the tests on the newest release of everything, in a venv of its own
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python $(INSTALL) packaging \
	  "$$(.venv-newest/bin/python requirements/choose_torch.py "$(TORCH)")"
	.venv-newest/bin/python $(INSTALL) --upgrade $$(.venv-newest/bin/python requirements/bounds.py newest dev)
	.venv-newest/bin/python $(INSTALL) --no-deps --editable .
	.venv-newest/bin/python requirements/versions.py
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -m "not slow" -n $(WORKERS)

test-oldest: .venv/.stamp-system  ## the tests of tuner, basis and command on the lower bounds, in a venv of its own
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python $(INSTALL) packaging
	.venv-oldest/bin/python requirements/bounds.py oldest > .venv-oldest/constraints.txt
	.venv-oldest/bin/python $(INSTALL) --constraint .venv-oldest/constraints.txt --editable . \
	  hypothesis plotly pytest pytest-timeout pytest-xdist scipy
	.venv-oldest/bin/python requirements/versions.py
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest tests/tuner tests/basis tests/cli -m "not slow" -n $(WORKERS)

constraints:  ## renew requirements/constraints*.txt: the newest releases that work together
	$(PYTHON) requirements/update_constraints.py

lint: .venv/.stamp-dev  ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.stamp-dev  ## speed and memory of everything, in under 20 minutes; JSON, tables and plots in benchmarks
	$(BIN)/python benchmarks/build_basis.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/tuner.py
	$(BIN)/python benchmarks/mixed.py
	$(BIN)/python benchmarks/hotswap.py
	$(BIN)/python benchmarks/checkpoint_size.py
	$(BIN)/python benchmarks/vggt.py
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/metrics.py
	$(BIN)/python benchmarks/render.py $(addprefix --cycles-python ,$(wildcard .venv-cycles/bin/python))
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/write_readme.py

clean:  ## remove .venv, caches and build outputs
	rm -rf .venv .venv-cycles .venv-newest .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@echo "usage: make TARGET [PYTHON=python3] [TORCH=torch]"
	@echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
	  printf '%-12s %s\n' "$$target" "$$text"; done
	@echo
	@echo "PYTHON is the interpreter for .venv (3.11 or newer); TORCH is the requirement installed first, for example"
	@echo "TORCH=torch==2.13.0. Both are read when .venv is made: run 'make clean' after changing them."

# One stamp per extra: .venv/.stamp-dev means that the package and its [dev] extra are installed.
.venv/.stamp-%: pyproject.toml $(CONSTRAINTS) .venv/.stamp-torch
	$(BIN)/python $(INSTALL) --constraint $(CONSTRAINTS) --editable ".[$*]"
	@touch $@

# Torch goes first, so that its build is the caller's choice and not the resolver's.
.venv/.stamp-torch: .venv/.stamp
	torch="$$($(BIN)/python requirements/choose_torch.py "$(TORCH)")"; $(BIN)/python $(INSTALL) "$$torch"
	@touch $@

# The report is tested in the system's Chromium, the ray caster needs GL's libraries; without them those tests are
# skipped, and say so.
BLENDER := libxrender1 libxfixes3 libxi6 libxkbcommon0 libsm6 libgl1
SYSTEM := chromium libegl1 libgl1 libusb-1.0-0
.venv/.stamp-system: .venv/.stamp
	@if ! command -v chromium >/dev/null || ! ldconfig -p | grep -q libEGL; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SYSTEM); \
	  else \
	    echo "make: some tests may be skipped here; on Debian: apt-get install $(SYSTEM)" >&2; \
	  fi; \
	fi
	@touch $@

# A one-node Slurm, which the slow tests start on loopback; without it they are skipped, and say so.
.venv/.stamp-slurm: .venv/.stamp-system
	@if ! command -v slurmctld >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge; \
	  else \
	    echo "make: the tests of Slurm are skipped here; on Debian: apt-get install slurm-wlm munge" >&2; \
	  fi; \
	fi
	@touch $@

# Packages of others that only slow tests use: a 3D model, without the packages that only its web demo needs, and the
# trainers, libraries and quantizers of tests/conformance and tests/tuner. What cannot be installed is skipped, and its
# tests say so.
LIBRARIES := trl datasets sentence-transformers diffusers hqq optimum-quanto bitsandbytes deepspeed
.venv/.stamp-third-party: .venv/.stamp-dev
	@$(BIN)/python $(INSTALL) --no-deps depth-anything-3 && \
	  $(BIN)/python $(INSTALL) --constraint $(CONSTRAINTS) addict einops omegaconf || \
	  echo "make: depth-anything-3 cannot be installed here: its test is skipped" >&2
	@for library in $(LIBRARIES); do \
	  $(BIN)/python $(INSTALL) --constraint $(CONSTRAINTS) "$$library" || \
	    echo "make: $$library cannot be installed here: its tests are skipped" >&2; \
	done
	@touch $@

# bpy wants an older numpy than the rest.
.venv-cycles/.stamp: pyproject.toml requirements/constraints-cycles.txt .venv/.stamp-system
	$(PYTHON) -m venv .venv-cycles
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(BLENDER); \
	fi
	.venv-cycles/bin/python $(INSTALL) --constraint requirements/constraints-cycles.txt numpy \
	  "$$(.venv-cycles/bin/python requirements/choose_torch.py "$(TORCH)")"
	.venv-cycles/bin/python $(INSTALL) --constraint requirements/constraints-cycles.txt --editable ".[scenes]" \
	  hypothesis pytest pytest-timeout
	@touch $@

# Debian ships venv apart from Python: without it, root gets it installed and everybody else a sentence.
.venv/.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' is not Python 3.11 or newer; name one that is: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	  package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$$package"; \
	  else \
	    echo "make: '$(PYTHON)' has no venv module; install it first, on Debian with: apt-get install $$package" >&2; \
	    exit 1; \
	  fi; \
	fi
	$(PYTHON) -m venv .venv
	@touch $@
