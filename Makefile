# make setup | demo | demo-sit | demo-mar | demo-t2i | bench | gpu | test | fuzz: each does all the set-up it needs,
# in .venv
# LOCK=requirements.lock takes the versions of that file, else the newest within the ranges of the requirements.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
FUZZ_EXAMPLES ?= 100000
LOCK ?=
EVERYTHING := .venv/ready$(if $(LOCK),-$(notdir $(LOCK)))
FOR_DEMO := .venv/ready-demo$(if $(LOCK),-$(notdir $(LOCK)))
FOR_PROMPTS := .venv/ready-prompts$(if $(LOCK),-$(notdir $(LOCK)))

.PHONY: setup demo demo-sit demo-mar demo-t2i bench gpu test fuzz clean

setup: $(EVERYTHING)

# One environment. A marker says what was installed last; everything is enough for the walkthroughs too.
define install
$(PYTHON) -m venv .venv
rm -f .venv/ready*
$(BIN)/pip install --quiet --disable-pip-version-check -r $(1) $(if $(LOCK),-c $(LOCK))
endef

$(EVERYTHING): requirements.txt requirements-demo.txt requirements-prompts.txt requirements-dev.txt $(LOCK)
	$(call install,requirements-dev.txt)
	touch $(EVERYTHING) $(FOR_PROMPTS) $(FOR_DEMO)

$(FOR_PROMPTS): requirements.txt requirements-demo.txt requirements-prompts.txt $(LOCK)
	$(call install,requirements-prompts.txt)
	touch $(FOR_PROMPTS) $(FOR_DEMO)

$(FOR_DEMO): requirements.txt requirements-demo.txt $(LOCK)
	$(call install,requirements-demo.txt)
	touch $@

demo: $(FOR_DEMO)
	$(BIN)/python examples/digits/demo.py

demo-sit demo-mar: demo-%: $(FOR_DEMO)
	$(BIN)/python examples/digits/demo.py --family $(if $(filter sit,$*),SiT,MAR)

demo-t2i: $(FOR_PROMPTS)
	$(BIN)/python examples/prompts/demo.py

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
	rm -rf .venv examples/digits/run examples/digits/run-sit examples/digits/run-mar examples/prompts/run
