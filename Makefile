# `make demo` and `make test` need nothing but Python 3.10 or newer: the first of them makes .venv and fills it, once.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/ready
OUT = examples/out

.PHONY: install demo test bench lint check fix clean

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
	@echo "Edited video:                        $(OUT)/edited.mp4"
	@echo "Source, driving, result side by side: $(OUT)/preview.mp4"

test: $(READY)
	$(BIN)/python -m pytest -q $(PYTEST_OPTIONS)

bench: $(READY)
	$(BIN)/python -m pytest -q -rA -m slow $(PYTEST_OPTIONS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

check: lint test

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info
