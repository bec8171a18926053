# planish: `make demo` needs nothing but Python 3.11; everything else builds on the environment that it makes.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
WORKERS ?= 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench services clean

demo: $(VENV)/.ready
	$(BIN)/planish demo --out out/demo.planish

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.ready-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.ready-bench
	@test -n "$(DATA)" || { echo "make bench: say where the data is: make bench DATA=folder"; exit 2; }
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script --data "$(DATA)" || exit 1; done

# What some tests need from the system: a browser. They are skipped, with the reason, where it is missing.
services:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then \
	  echo "services: chromium and its driver are here"; \
	elif ! command -v apt-get >/dev/null; then \
	  echo "services: no apt-get here; install chromium and its driver by hand, or the browser tests are skipped"; \
	elif [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; \
	elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then \
	  sudo apt-get update -qq && sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; \
	else \
	  echo "services: not root and no sudo; install chromium and chromium-driver, or the browser tests are skipped"; \
	fi

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis src/planish.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[openvino,test]'
	touch $@

$(VENV)/.ready-lint: $(VENV)/.ready
	$(PIP) -e '.[openvino,test,lint]'
	touch $@

$(VENV)/.ready-bench: $(VENV)/.ready
	$(PIP) -e '.[openvino,test,bench]'
	touch $@
