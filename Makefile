# Everything a newcomer needs: make run, make demo, make test, make check.
# Each target makes the environment first: a virtual environment from hashed lock files, under .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := bench/peers
# pip would otherwise ask its index whether it is itself of date, and hide what it does behind a bar.
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: run demo test check clients faults soak bench bench-quick lock schema docs format clean

run: $(VENV)/run.stamp
	@exec $(BIN)/python -m server

demo: $(VENV)/run.stamp
	@exec $(BIN)/python -m server demo

# More workers than cores: the tests wait for sockets, processes and leases about as long as they compute. What Python has
# compiled is kept whatever the caller's environment says: each worker and each server that a test starts needs it.
test: $(VENV)/dev.stamp
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --numprocesses 4 --dist worksteal $(TESTS)

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m server schema | diff schema.graphql - || (echo "schema.graphql differs from the code: run make schema" && false)

# The same demo by the real npm clients (needs Node 20 or newer).
clients: $(VENV)/run.stamp
	cd tests/clients && npm ci --silent --no-progress
	$(BIN)/python -m tests.clients.run

# What goes wrong, on real servers: so many random histories (SEEDS), or one again (SEED).
SEEDS ?= 20
JOBS ?= 2
faults: $(VENV)/dev.stamp
	$(BIN)/python -m tests.faults $(if $(SEED),--seed $(SEED),--seeds $(SEEDS) --jobs $(JOBS))

# Side by side with others; writes docs/benchmarks.md, its picture and the table of the README. A quarter of an hour.
bench: $(VENV)/dev.stamp $(PEERS)/node_modules/made.stamp
	$(BIN)/python -m bench --write

bench-quick: $(VENV)/dev.stamp $(PEERS)/node_modules/made.stamp
	$(BIN)/python -m bench --quick

# Without Node, or without its packages, the benchmark says so and goes on.
$(PEERS)/node_modules/made.stamp: $(PEERS)/package-lock.json
	@(cd $(PEERS) && npm ci --silent --no-progress --ignore-scripts && touch node_modules/made.stamp) || \
		echo "The servers by Node are left out: npm ci failed in $(PEERS)."

# A server under churn; it fails where memory, files, tasks or connections grow. MINUTES=… for longer or shorter.
soak: $(VENV)/dev.stamp
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),30)

schema: $(VENV)/run.stamp
	$(BIN)/python -m server schema > schema.graphql

docs: $(VENV)/run.stamp
	$(BIN)/python -m server settings > docs/settings.md

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Needs uv; the lock files name no registry.
lock:
	uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet --output-file requirements/run.lock
	uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet --output-file requirements/dev.lock

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Python 3.11 or newer is needed; set PYTHON=..." && false)
	@echo "Making the environment in $(VENV), once; this takes about half a minute."
	@$(PYTHON) -m venv $(VENV) || (echo "python3 -m venv does not work here; on Debian and Ubuntu: apt install python3-venv" && false)

$(VENV)/run.stamp: requirements/run.lock | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements/run.lock
	@touch $@

$(VENV)/dev.stamp: requirements/dev.lock | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements/dev.lock
	@touch $@ $(VENV)/run.stamp
