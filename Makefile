# `make demo` and `make test` set up everything they need: a virtual environment in .venv and the packages of pyproject.toml.
# PYTHON=python3.12 picks another interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo demo-label-free demo-smolomni test lint organism smolomni smolomni-retrain clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "avbalance needs Python 3.11 or newer; say make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade uv
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## diagnose the biased organism, fine-tune it, diagnose it again, write the page
	$(BIN)/accelerate launch --config_file accelerate_config.yaml train

demo-label-free: setup  ## the same without a single sound label in training
	$(BIN)/accelerate launch --config_file accelerate_config.yaml train --config configs/organism_label_free.yaml

test: setup lint  ## what CI runs
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy data models analysis train benchmarks

organism: setup  ## rebuild the checkpoints in models/organism (under 20 minutes on 2 cores)
	$(BIN)/python -m models.organism

smolomni: setup  ## a real small audio-visual LLM: fetches its pretrained parts and media, joins them by the adapters in models/smolomni
	$(BIN)/python -m data.fetch --out runs/smolomni/sources
	$(BIN)/python -m models.build_smolomni

# bfloat16 halves the time where the processor has instructions for it, and only there
BFLOAT16 := $(shell grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo && echo --bfloat16)

smolomni-retrain: setup  ## trains those adapters anew (about 45 minutes on 2 cores in bfloat16)
	$(BIN)/python -m data.fetch --out runs/smolomni/sources
	$(BIN)/python -m models.build_smolomni --retrain $(BFLOAT16)

demo-smolomni: smolomni  ## the demo's job on it (about an hour on 2 cores in bfloat16, and 7.6 GB)
	$(BIN)/accelerate launch --config_file accelerate_config.yaml train --config configs/smolomni.yaml $(if $(BFLOAT16),--model.dtype bfloat16)

clean:
	rm -rf .venv runs build .pytest_cache .ruff_cache .mypy_cache *.egg-info
