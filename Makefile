# make demo and make test need Python 3.11 or later and nothing else; .venv is made on the way.

PY ?= python3
BIN := .venv/bin
THREADS := OMP_NUM_THREADS=1
.DEFAULT_GOAL := help
.PHONY: help demo test docs bench gpu-check peers speed clean

help:
	@echo "make demo       PPO on a small language model, two FSDP processes, about 5 minutes"
	@echo "make test       all tests, half an hour to an hour on two cores"
	@echo "make docs       the documentation as a web site in site/"
	@echo "make gpu-check  every script for a few updates on the GPU, compared with the CPU"
	@echo "make speed      speed of the sampler and of scoring against transformers"
	@echo "make bench      what the results lack of the claims at scale laptop, then the pages"
	@echo "make peers      the libraries that make speed compares with, in .venv-peers"
	@echo "make clean      remove both environments, caches and site/; runs/ stays"
	@echo "PY=python3.12 make ... chooses the interpreter"

.venv/made:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Folio needs Python 3.11 or later, $(PY) is $$($(PY) --version 2>&1)." \
	  "Choose another: make PY=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PY) -m venv .venv
	@touch $@

# Stamps: an install runs again when its requirements change.
.venv/installed: .venv/made requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check mkdocs
	@touch $@

demo: .venv/installed
	$(BIN)/python -m rlhf.tiny_lm
	$(THREADS) $(BIN)/torchrun --standalone --nproc_per_node 2 algos/ppo_rlhf_fsdp.py \
	  --run-dir runs/demo-$$(date +%Y%m%d-%H%M%S)

test: .venv/installed-test
	$(THREADS) $(BIN)/python -m pytest -n 2 --dist loadgroup

docs: .venv/installed-docs
	$(BIN)/mkdocs build

gpu-check: .venv/installed
	$(BIN)/python -m benchmark gpu-check

bench: .venv/installed
	for paper in $(notdir $(basename $(wildcard benchmark/papers/*.toml))); do \
	  $(BIN)/python -m benchmark run $$paper --scale laptop || failed=1; done; \
	  $(BIN)/python -m benchmark report && test -z "$$failed"

.venv-peers/installed: benchmark/peers/requirements.txt
	$(PY) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

peers: .venv-peers/installed

speed: .venv/installed
	$(BIN)/python -m benchmark speed sampler
	$(BIN)/python -m benchmark speed scoring

clean:
	rm -rf .venv .venv-peers .pytest_cache .ruff_cache site
	find . -name __pycache__ -prune -exec rm -rf {} +
