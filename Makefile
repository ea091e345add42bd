# make setup | demo | demo-sit | demo-mar | bench | gpu | test | fuzz: each does all the set-up it needs in .venv
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
FUZZ_EXAMPLES ?= 100000

.PHONY: setup demo demo-sit demo-mar bench gpu test fuzz clean

setup: .venv/ready

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: setup
	$(BIN)/python examples/digits/demo.py

demo-sit demo-mar: demo-%: setup
	$(BIN)/python examples/digits/demo.py --family $(if $(filter sit,$*),SiT,MAR)

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=5 -n $(WORKERS) --dist worksteal

fuzz: setup
	OMP_NUM_THREADS=1 FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -v tests/fuzz

bench: setup
	$(BIN)/python -m benchmarks

gpu: setup
	$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf .venv examples/digits/run examples/digits/run-sit examples/digits/run-mar
