# One virtual environment, made once per lock file, serves every target.
# The first interpreter that truly runs: a version manager's shim can be on PATH and still refuse.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell \
	$(p) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $(p))))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The portable program runs without TensorFlow, in an environment of its own with JAX.
PYTHON_JAX ?= $(firstword $(foreach p,python3.12 python3.13 python3.14 python3,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 12))' 2>/dev/null && echo $(p))))
PORTABLE := .portable_env
SOURCES := soft_diffusion_tf configs tests tools setup.py BUILD

# Test files that take seconds: rooms, files beside the code, configs, and the arithmetic of the ground.
FAST := $(addprefix tests/test_,architecture.py project.py arrays.py schedules.py gaussians.py neighbours.py diffusion.py \
	experiment.py losses.py configs.py)

.PHONY: help install quickstart test test-fast test-slow test-portable lint format build docs study-digits \
	study-defaults study-mixtures study-cifar clean

help:
	@echo "make quickstart  train on the built-in digits and look at the samples (minutes)"
	@echo "make test-fast   the quick tests, under a minute on one core"
	@echo "make test        the tests;  make test-slow: the long ones too"
	@echo "make test-portable  the portable program by JAX, in an environment that it makes"
	@echo "make lint        ruff, mypy, and whether BUILD is up to date;  make format: rewrite by ruff"
	@echo "make build       write BUILD again from the imports of the sources"
	@echo "make study-digits, make study-cifar  the paper's claims, tried (hours; days); both go on"
	@echo "make study-defaults  what the paper leaves open, tried on digits (20 minutes)"
	@echo "make study-mixtures  losses between the filtered and the unfiltered one, on digits (an hour)"
	@echo "make docs        the site, in site/"
	@echo "make install     only the virtual environment in $(VENV)"

install: $(STAMP)

$(STAMP): requirements.lock setup.py
	@test -n "$(PYTHON)" || \
		{ echo "error: Python 3.11, 3.12 or 3.13 is needed; install one or give make PYTHON=PATH"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "error: python3 has no venv; apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/python tools/quickstart.py --config=configs/digits_blur.py --workdir=runs/quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(STAMP)
	$(BIN)/python -m pytest $(FAST) -k "not shrunken"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or not slow"

$(PORTABLE)/.installed: tools/portable_runner.py
	@test -n "$(PYTHON_JAX)" || \
		{ echo "error: JAX needs Python 3.12 or later; install one or give make PYTHON_JAX=PATH"; exit 1; }
	test -x $(PORTABLE)/bin/python || $(PYTHON_JAX) -m venv $(PORTABLE)
	$(PORTABLE)/bin/python -m pip install --quiet \
		"jax==$$(sed -n 's/^JAX = "\(.*\)".*/\1/p' tools/portable_runner.py)" pillow
	@touch $@

test-portable: $(STAMP) $(PORTABLE)/.installed
	PORTABLE_ENV=$(PORTABLE) $(BIN)/python -m pytest tests/tools/test_portable.py -m "slow or not slow"

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python tools/build.py --check

format: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict --config-file tools/mkdocs.yml

study-digits: $(STAMP)
	$(BIN)/python tools/study.py --study=digits --out=runs/study_digits

study-defaults: $(STAMP)
	$(BIN)/python tools/study.py --study=defaults --out=runs/study_defaults

study-mixtures: $(STAMP)
	$(BIN)/python tools/study.py --study=mixtures --out=runs/study_mixtures

# DATA_DIR: where TFDS keeps CIFAR-10; FEATURE_NET: the folder of a SavedModel that judges images.
study-cifar: $(STAMP)
	$(BIN)/python tools/study.py --study=cifar --out=runs/study_cifar \
		$(if $(DATA_DIR),--data_dir=$(DATA_DIR)) $(if $(FEATURE_NET),--feature_net=$(FEATURE_NET))

build: $(STAMP)
	$(BIN)/python tools/build.py

clean:
	rm -rf $(VENV) $(PORTABLE) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
