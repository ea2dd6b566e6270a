# The README's two commands are `make demo` and `make test`.  Each makes .venv when it is missing or out of date.
#
#   PYTHON       the interpreter that makes .venv                           make demo PYTHON=python3.12
#   TORCH        another torch requirement                                  make demo TORCH='torch==2.12.*'
#   TESTERS      processes that `make test` spreads the test files over     make test TESTERS=8
#   TORCH_INDEX  the package index to take torch from.  PyPI's torch for Linux brings 3 GB of CUDA libraries;
#                a machine without a GPU can save them:
#                    make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
TESTERS ?= 2

ifeq ($(shell nvidia-smi -L >/dev/null 2>&1 && echo yes),yes)
TORCH ?= torch==2.11.*
EXTRAS ?= cpu,cuda,dev
else
TORCH ?= torch==2.13.0
EXTRAS ?= cpu,dev
endif

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed-$(shell echo '$(TORCH) $(TORCH_INDEX) $(EXTRAS)' | cksum | cut -d ' ' -f 1)

.PHONY: demo test prove lint bench gpu clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo    draw a sheet of pictures, optimized beside eager, and verify them"
	@echo "make test    ruff, mypy and samples of every test (what CI runs)"
	@echo "make prove   the full tests and benchmarks, written to benchmarks/; an hour or two, goes on where it was stopped"
	@echo "make lint    ruff and mypy"
	@echo "make bench   the speed of the embedded model, side by side"
	@echo "make gpu     tests, timings and profile of a GPU, written to build/gpu; ONLY=compile,bench picks sections"

demo: $(INSTALLED)
	$(BIN)/python -m allaprima.demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TESTERS) --dist loadfile

# Every number of the README comes from a file that one of these commands wrote under benchmarks/.
PROOFS := tests captures verify-float32 verify-bfloat16 verify-zh verify-zh-3d \
	bench-float32 bench-bfloat16 bench-sd15-float32 bench-sd15-bfloat16
RUN_tests               = python -m pytest -m "slow or not slow"
RUN_captures            = python -m allaprima.verification.captures
RUN_verify-float32      = python -m allaprima.verification --model emoji --dtype float32
RUN_verify-bfloat16     = python -m allaprima.verification --model emoji --dtype bfloat16
RUN_verify-zh           = python -m allaprima.verification --model emoji-zh --dtype float32 --prompts 12
RUN_verify-zh-3d        = python -m allaprima.verification --model emoji-zh-3d --dtype float32 --prompts 12
RUN_bench-float32       = allaprima bench --model emoji --dtype float32
RUN_bench-bfloat16      = allaprima bench --model emoji --dtype bfloat16
RUN_bench-sd15-float32  = allaprima bench --arch sd15 --dtype float32 --what step --sizes 256x256,512x512 --repeats 7
RUN_bench-sd15-bfloat16 = allaprima bench --arch sd15 --dtype bfloat16 --what step --sizes 256x256,512x512 --repeats 7

# What these sources have been through already; started again, `make prove` goes on after it.
SOURCES := src tests pyproject.toml
PROVED := build/proved-$(shell { echo '$(INSTALLED)'; git rev-parse $(SOURCES:%=HEAD:%); git diff HEAD -- $(SOURCES); } \
	2>/dev/null | cksum | cut -d ' ' -f 1)

prove: lint $(PROOFS:%=$(PROVED)/%)

$(PROVED)/%: | $(INSTALLED)
	$(BIN)/$(RUN_$*)
	@mkdir -p $(@D) && touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/allaprima bench

gpu: $(INSTALLED)
	$(BIN)/python -m allaprima.bench.gpu_session $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch goes first and by itself, so that nothing after it picks another build.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "allaprima needs Python 3.11 or later; choose one with PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { echo "No virtual environment could be made: on Debian, apt-get install python3-venv"; exit 1; }
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) install --quiet --editable '.[$(EXTRAS)]'
	@rm -f $(VENV)/.installed-* && touch $@
