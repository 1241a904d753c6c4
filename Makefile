# Every target makes the environment it needs in .venv; nothing has to be activated or installed beforehand.

VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo bench test test-all lint clean
.NOTPARALLEL:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp  ## train a LongConv classifier on handwritten digits (L = 1024, minutes on two CPU cores)
	$(BIN)/python -m experiments.digits.train

bench: $(VENV)/demo.stamp  ## time the convolution on this machine's device, against rivals and physical limits
	$(BIN)/python -m experiments.benchmarks.convolution

test: lint  ## everything that continuous integration runs
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-all: lint  ## `make test` and the slow tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not gpu"

lint: $(VENV)/dev.stamp  ## format, style and type checks alone
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

clean:  ## remove the environment, caches and build products; reports are kept
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
	find flashbutterfly_jax pallas_kernels experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of extras. The build backends are installed first, at their pinned versions, and used without
# isolation, because pip does not apply constraints to the isolated environments in which it builds packages.
# setuptools is for `promise`, which tensorflow-datasets needs and which has no wheel.
$(VENV)/%.stamp: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { python=$$(.ci/find_python) && "$$python" -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt hatchling editables setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[$*]'
	@touch $@
