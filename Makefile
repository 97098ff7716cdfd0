# `make demo` and `make test` need nothing but Python 3.10 or newer: the first of them makes .venv and fills it, once.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/ready
OUT = examples/out

.PHONY: install demo bench test train-smoke gpu-train lint check fix clean

install: $(READY)

# torch comes first, by name: a later package that only asks for "torch" must find the pinned one already there.
$(READY): setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/python examples/make_demo.py $(OUT)
	$(BIN)/dpe edit --source $(OUT)/source.mp4 --driving $(OUT)/driving.mp4 --mode exp \
		--output $(OUT)/edited.mp4 --preview $(OUT)/preview.mp4 --overwrite $(DEMO_OPTIONS)
	$(BIN)/dpe dub --source $(OUT)/source.mp4 --audio $(OUT)/speech.wav --output $(OUT)/dubbed.mp4 --overwrite $(DEMO_OPTIONS)
	@echo "Edited video:                        $(OUT)/edited.mp4"
	@echo "The source saying speech.wav:        $(OUT)/dubbed.mp4"
	@echo "Source, driving, result side by side: $(OUT)/preview.mp4"

bench: $(READY)
	$(BIN)/dpe benchmark --mode exp --mode pose --mode both --source video --source still --compare \
		$(BENCH_OPTIONS)
	$(BIN)/python -m pytest -q -rA -m slow

# A process for each core, with one thread each: more would get in each other's way.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 $(PYTEST_OPTIONS)

# The part of the tests that trains: minutes on a CPU.
train-smoke: $(READY)
	$(BIN)/python -m pytest -q -m smoke

# Prepare, train within MINUTES, evaluate: on a GPU, or with DEVICE=cpu MINUTES=3 as a rehearsal.
# CLIPS: videos, folders or an index for `dpe prepare`; VGG: VGG16 features as safetensors; RUN: how dpe is called here.
RUN ?= $(BIN)/dpe
DATA ?= prepared
GPU_OUT ?= run
DEVICE ?= cuda
MINUTES ?= 25
gpu-train:
	@test -f "$(VGG)" || { echo "VGG=$(VGG) is no file: make gpu-train VGG=FILE names VGG16 features" >&2; exit 2; }
	$(RUN) prepare $(CLIPS) -o $(DATA) --workers $$(nproc) $(PREPARE_OPTIONS)
	$(RUN) train --config weights/gpu.toml --budget $(MINUTES) --data $(DATA) -o $(GPU_OUT) --device $(DEVICE) \
		--perceptual $(VGG) $(TRAIN_OPTIONS)
	$(RUN) eval --data $(DATA) --weights $(GPU_OUT)/weights.safetensors -o $(GPU_OUT)/eval $(EVAL_OPTIONS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

check: lint test

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info
