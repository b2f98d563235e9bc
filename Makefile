# Every target works in a fresh clone: it makes .venv and installs what it needs, once.
#
# On Linux, PyPI's PyTorch brings CUDA along. Where that is not wanted:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_ARGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
BENCH_OUT ?=

VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
NEWEST := .venv-newest
INSTALLED = $(VENV)/.installed-
OUT = $(addprefix --out ,$(BENCH_OUT))

.PHONY: help demo test test-slow test-lowest test-newest docs bench-speed bench-language bench-control bench-rlhf bench-rlhf-quick clean

help:
	@echo "make demo       train the embedded language model, show what changed (DEMO_ARGS=\"--timesteps 20000\")"
	@echo "make test       lint, types, tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-lowest   the tests on the oldest versions that pyproject.toml allows (of NumPy with the extra data: 2.0)"
	@echo "make test-newest   the tests on the newest ones"
	@echo "make docs       docs/_build/html/index.html"
	@echo "make bench-speed, bench-language   the figures of README's section on speed"
	@echo "make bench-control   SAFE against PPO on control tasks: the runs that have no result yet (BENCH_ARGS=\"--seeds 1\")"
	@echo "make bench-rlhf   SAFE against PPO on language: the runs that have no result yet"
	@echo "make bench-control BENCH_OUT=runs/control, make bench-rlhf BENCH_OUT=runs/rlhf   all runs, in a folder of their own: days"
	@echo "make bench-rlhf-quick   language at 3 and 10 times the rate, one seed, in runs/rlhf-quick: a quarter of an hour"
	@echo "make clean      remove the environments and what was built"

demo: $(INSTALLED)demo
	$(BIN)/python -m sb3_safe.demo $(DEMO_ARGS)

test: $(INSTALLED)dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(PYTEST_ARGS)

test-slow: $(INSTALLED)dev
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

# Without what older versions keep in memory otherwise than those the plans of memory are held to.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/pytest $(PYTEST_ARGS) \
		--deselect tests/test_footprint.py::test_scoring_takes_what_is_planned \
		--deselect tests/test_plan.py::test_the_page_on_memory_shows_what_the_command_prints

# What an installation without constraints.txt gets.
test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/pytest $(PYTEST_ARGS)

docs: $(INSTALLED)docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

bench-speed: $(INSTALLED)bench .venv-sbx/bin/python
	$(BIN)/python benchmarks/speed.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/pages.py

bench-language: $(INSTALLED)bench
	$(BIN)/python benchmarks/language.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/pages.py

# Runs that have a result are skipped, the published ones too. With BENCH_OUT, a folder, all are made and reported there;
# the pages keep the published figures.
bench-control: $(INSTALLED)bench
	$(BIN)/python benchmarks/control.py run --suite tuned $(OUT) $(BENCH_ARGS)
	$(BIN)/python benchmarks/control.py run --suite stress $(OUT) $(BENCH_ARGS)
	$(BIN)/python benchmarks/control.py run --suite ablation $(OUT) $(BENCH_ARGS)
	$(BIN)/python benchmarks/control.py report $(OUT)
	$(BIN)/python benchmarks/pages.py

bench-rlhf: $(INSTALLED)bench
	$(BIN)/python benchmarks/rlhf.py run --suite tuning $(OUT) $(BENCH_ARGS)
	$(BIN)/python benchmarks/rlhf.py report $(OUT)
	$(BIN)/python benchmarks/rlhf.py run --suite main $(OUT) $(BENCH_ARGS)
	$(BIN)/python benchmarks/rlhf.py run --suite rates $(OUT) $(BENCH_ARGS)
	$(BIN)/python benchmarks/rlhf.py report $(OUT)
	$(BIN)/python benchmarks/rlhf.py run --suite own-rates $(OUT) $(BENCH_ARGS)
	$(BIN)/python benchmarks/rlhf.py run --suite ablation $(OUT) $(BENCH_ARGS)
	$(BIN)/python benchmarks/rlhf.py run --suite strength $(OUT) $(BENCH_ARGS)
	$(BIN)/python benchmarks/rlhf.py report $(OUT)
	$(BIN)/python benchmarks/pages.py

# Beside the published runs it would find itself done, and the report would draw those.
bench-rlhf-quick: OUT = --out runs/rlhf-quick
bench-rlhf-quick: $(INSTALLED)bench
	$(BIN)/python benchmarks/rlhf.py run --quick $(OUT) $(BENCH_ARGS)
	$(BIN)/python benchmarks/rlhf.py report $(OUT)

# SBX in an environment of its own: it brings JAX.
.venv-sbx/bin/python:
	$(PYTHON) -m venv .venv-sbx
	.venv-sbx/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt torch
	.venv-sbx/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt sbx-rl "gymnasium[mujoco]"

# uv, because pip cannot be asked for the oldest versions. Tests of what is not in the extra are skipped.
$(LOWEST)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct $(PIP_ARGS) -e ".[test]"
	@touch $@

$(NEWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet $(PIP_ARGS) -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) .venv-sbx docs/_build

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python 3.11 or newer is needed; $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)

# One stamp per extra. PyTorch goes first, by itself: the pinned build is then there before anything asks for another.
$(INSTALLED)%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing sb3-safe[$*] into $(VENV). PyTorch is a large download; this is done once."
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[$*]"
	@touch $@
