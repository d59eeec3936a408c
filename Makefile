# make demo: install, give everybody sunglasses in three ways, and write one page. make test: what CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# a torch for CUDA wants one version of Triton, which came with it
ON_CPU = $$($(BIN)/python -c "import torch; print('' if torch.version.cuda else '-c constraints-cpu.txt')")
# kernel tests that `make test` also runs in Triton's interpreter; without the variable they run on compiled PTX
INTERPRETED = tests/kernels/test_accuracy.py
# one run of every method
METHODS = tests/invariants/test_training.py::test_every_schedule_trains_and_changes_the_weights
# a file's tests share what they have built, so they stay in one process
# and in the order of their folders: the first ones start processes, and what is short fills the end
PYTEST = $(BIN)/python -m pytest -q -n logical --dist loadfile --no-loadscope-reorder
CHECKED = hrf_fast kernels benchmarks pretraining tests setup.py

.PHONY: demo demo-fashion check test interpreted test-all test-kernels gpu-check soak lint install install-gpu clean

# DDPO as published, which is shown to its end, DDPO and HRF with this project's options; all stop at one reward
DEMO = --config configs/demo_peeps.yaml run.folder=runs/demo
demo: $(VENV)/.base
	$(BIN)/hrf train --config configs/peeps_published.yaml $(DEMO)-published stop.on_collapse=warn evaluation.every=7
	$(BIN)/hrf train --config configs/peeps_ddpo.yaml $(DEMO)-ddpo
	$(BIN)/hrf train --config configs/peeps_hrf.yaml $(DEMO)-hrf
	$(BIN)/hrf report runs/demo-published runs/demo-ddpo runs/demo-hrf --out runs/demo.html --strip runs/demo.png \
		--name "DDPO" --name "DDPO + options" --name "HRF + options"
	@echo "smaller JPEGs of product photos: make demo-fashion"

demo-fashion: $(VENV)/.base
	$(BIN)/hrf train --config configs/demo_fashion.yaml
	$(BIN)/hrf train --config configs/demo_fashion.yaml --config configs/demo_ddpo.yaml run.folder=runs/demo-fashion-ddpo
	$(BIN)/hrf report runs/demo-fashion-hrf runs/demo-fashion-ddpo --out runs/demo-fashion.html --strip runs/demo-fashion.png

# while you work: lint, types, unit tests that are not marked long, one run of every method
check: $(VENV)/.test lint
	$(PYTEST) -m "not slow and not long" tests/unit tests/parity $(METHODS)

# what CI runs; lint keeps one core busy, and the interpreter's tests the other
test: $(VENV)/.test
	$(MAKE) --jobs=2 --output-sync lint interpreted
	$(PYTEST) -m "not slow" --durations=10

interpreted: $(VENV)/.test
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" $(INTERPRETED)

# everything, with a floor of coverage
test-all: $(VENV)/.test lint
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-fail-under=90
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels

# every specialisation of the kernels, as PTX and in Triton's interpreter: when kernels/ or tests/ptx/ changed
test-kernels: $(VENV)/.test lint
	$(PYTEST) tests/kernels tests/ptx tests/unit/test_reference.py
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels

# on a machine with a GPU: what is proven without one, and figures, in at most ten minutes; it goes on where it stopped.
# GPU=--dry-run goes as far as a CPU can; `make install-gpu gpu-check` proves xformers, bitsandbytes and DeepSpeed too
gpu-check: $(VENV)/.test
	$(BIN)/hrf bench gpu $(GPU)

# stop a training run by SIGKILL, SIGTERM, SIGHUP and Ctrl-C in turn, resume it, and so on; then compare it with an
# unbroken one; and again with adapters of a text-to-image model. ENGINE="section.field=value"
soak: $(VENV)/.test
	$(BIN)/python -m tests.faults.soak --kills 24 --seed $$(date +%s) $(ENGINE)
	$(BIN)/python -m tests.faults.soak --kills 16 --text --seed $$(date +%s) $(ENGINE)

lint: $(VENV)/.test
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

install: $(VENV)/.base

$(VENV)/.base: setup.py pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/.test: $(VENV)/.base constraints-cpu.txt
	$(PIP_INSTALL) $(ON_CPU) -e ".[test]"
	touch $@

# triton, deepspeed, bitsandbytes, xformers: on a machine with a CUDA GPU
install-gpu: $(VENV)/.base
	$(PIP_INSTALL) -e ".[gpu]"

# not runs/, where trainings are
clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
