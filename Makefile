# Everything runs in its own virtual environment, made on first use from nothing but Python and make.
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
UV ?=  # a path of uv, which installs in less than half of pip's time
install = $(if $(UV),$(UV) pip install --quiet --python $(1)/bin/python,$(1)/bin/pip install --quiet --no-compile)

.PHONY: help demo app test soak lint lowest bench
.DEFAULT_GOAL := help

help:  ## Show what can be made
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/'

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip  # older ones take minutes to find the versions
	$(call install,$(VENV)) --editable '.[dev]'
	touch $@

demo: $(INSTALLED)  ## Train IEFT on synthetic scenes, rank the test split, draw the result (a few minutes on a CPU)
	$(BIN)/python run_retrieval.py --dataset_name scenes --phrase_probability 0.2 --output_dir outputs/demo --resume_from_checkpoint true
	@echo "Look at outputs/demo/ranked.png and outputs/demo/training.png."

app: $(INSTALLED)  ## Search page, http://127.0.0.1:7860: `make app ARCHIVE=photos` for your images; else synthetic scenes
ifdef ARCHIVE
	$(BIN)/python app.py --model checkpoints/small --index "outputs/$(notdir $(abspath $(ARCHIVE))).lance" --archive "$(ARCHIVE)"
else
	test -f outputs/demo/test_results.json || $(MAKE) demo
	$(BIN)/python app.py --model outputs/demo --index outputs/scenes.lance --archive outputs/scenes --draw_scenes 400
endif

test: $(INSTALLED)  ## Run the tests, without network
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not soak" --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 15

soak: $(INSTALLED)  ## Run the programs that kill, watch and fuzz, each for a short time
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak

lint: $(INSTALLED)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lowest:  ## Try the lowest versions that setup.cfg declares, in an environment of their own (3 GB, minutes)
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) tests/lowest_versions.py > $(LOWEST)/requirements.txt
	$(LOWEST)/bin/pip install --quiet --upgrade pip
	$(call install,$(LOWEST)) --requirement $(LOWEST)/requirements.txt
	HF_HUB_OFFLINE=1 $(LOWEST)/bin/python tests/lowest_versions.py --check

bench: $(INSTALLED)  ## Measure how fast images are ranked, and a training step
	PYTHONPATH=. $(BIN)/python benchmarks/bench_ranking.py
	PYTHONPATH=. $(BIN)/python benchmarks/bench_training.py
