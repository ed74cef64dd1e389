# Two commands for users: `make quickstart` and `make test`. Both install into .venv and nowhere else.
PYTHON ?= python3
BIN := .venv/bin
REPORT := results/quickstart/report/report.html
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Snakemake needs a home folder and a user name, which a container may lack.
ifeq ($(HOME),)
export HOME := $(CURDIR)/.venv/home
endif
ifeq ($(LOGNAME)$(USER),)
USER := $(shell id -un 2>/dev/null)
USER := $(or $(USER),user)
export USER
endif

.PHONY: help quickstart test bench bench-gpu
help:
	@echo "make quickstart   install into .venv, run the whole pipeline on the bundled digits, print the students"
	@echo "make test         install the test tools, run the linters, mypy and all tests"
	@echo "make bench        run the benchmarks, keep their results in benchmarks/results (BENCH=--quick only checks that they run)"
	@echo "make bench-gpu    check kernels, then check and time training, labels and data on a GPU, under 4 minutes"

quickstart: .venv/installed
	@$(BIN)/snakemake --configfile config/quickstart.yaml --cores all --quiet host rules reason
	@echo
	@$(BIN)/proard students results/quickstart
	@echo "Report: $(REPORT)"

# Numeric tests, which are also run with the instructions of a CPU without AVX-512, with one thread and with two.
NUMERIC := $(addprefix tests/test_,gradients.py types.py nets.py input_gradient.py maps.py depthwise.py norms.py \
	mobilenet.py attacks.py training.py)
DAG := tests/test_pipeline.py::test_the_whole_dag_ends_in_checked_students
NARROW := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check workflow proard/runs/Snakefile
	$(BIN)/python -m mypy
	$(BIN)/snakemake --lint --configfile config/quickstart.yaml
	$(BIN)/python -m pytest -n 2 --durations=8 -m "not cluster"
	$(NARROW) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(NUMERIC)
	$(NARROW) OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q -n 1 $(NUMERIC) $(DAG)
	$(BIN)/python -m pytest -n 4 --dist worksteal -m cluster # they mostly wait

bench: .venv/installed
	$(BIN)/python benchmarks/run_all.py $(BENCH)

bench-gpu: .venv/installed
	$(BIN)/python benchmarks/bench_gpu.py --json

# The stamps are older than pyproject.toml when the requirements have changed.
.venv/installed: pyproject.toml | $(BIN)/python
	@echo "Installing proard and what it needs into .venv; torch is large, this takes one to several minutes."
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/installed-test: pyproject.toml | $(BIN)/python
	@echo "Installing proard and the test tools into .venv; torch is large, this takes one to several minutes."
	@$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@ .venv/installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "proard needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@$(PYTHON) -m venv .venv
