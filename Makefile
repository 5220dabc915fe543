# make run    the main job on its embedded default, in a virtual environment made here
# make test   lint, types and tests in the same environment, with what they need; with --jobs=2 the clients'
#             environment is made meanwhile
# make test-all  the long runs too (10,000 random strategy traces)
# make test-clients  clients in small environments of their own (litellm, instructor, llm, an agent kit; with npm those
#                    in JavaScript too), against a server of this one (a part of make test)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
COMPILED_STAMP := $(VENV)/.compiled
CLIENTS := .venv-clients
CLIENTS_STAMP := $(CLIENTS)/.installed
JS_STAMP := $(CLIENTS)/js/.installed
# pip would compile every file, most of which nobody imports: a minute. Python compiles what it imports and keeps it.
INSTALL := python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: run test test-all test-clients lint clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) -c constraints.txt -e '.[serve]'
	touch $(STAMP)

# What tests import, and they themselves, are compiled once, not by each of their processes. What is wrong the tests say.
$(COMPILED_STAMP): $(DEV_STAMP)
	-PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --collect-only -qq > /dev/null
	touch $(COMPILED_STAMP)

# The extra `dev` brings `serve` along: one installation, not a second one after that of `make run`.
$(DEV_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) -c constraints.txt -e '.[dev]'
	touch $(STAMP) $(DEV_STAMP)

$(CLIENTS_STAMP): tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/$(INSTALL) -r tests/clients/requirements.txt
	touch $(CLIENTS_STAMP)

# Without npm nothing is installed, and the tests of these clients are skipped.
$(JS_STAMP): $(CLIENTS_STAMP) tests/clients/js/package-lock.json
	mkdir -p $(CLIENTS)/js
	cp tests/clients/js/package.json tests/clients/js/package-lock.json $(CLIENTS)/js/
	if command -v npm >/dev/null; then npm ci --prefix $(CLIENTS)/js --no-audit --no-fund --loglevel error; fi
	touch $(JS_STAMP)

run: $(STAMP)
	$(BIN)/python run.py

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers 2

test: lint $(COMPILED_STAMP) $(JS_STAMP)
	$(BIN)/python -m pytest -n 3 --dist loadfile -m "not slow and not gpu"

test-clients: $(DEV_STAMP) $(JS_STAMP)
	$(BIN)/python -m pytest tests/server/test_other_clients.py -k "own or agent or javascript"

test-all: test
	$(BIN)/python -m pytest -m slow
	$(BIN)/kvarena check traces --traces 10000 --seed 0

clean:
	rm -rf $(VENV) $(CLIENTS) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
