# make book: the book in _build/html/index.html      make test: all tests, and the chapters run a second time
# Both make .venv from requirements.lock first; a second run starts at once.
# make serving: the plugin for vLLM in a running engine, in .venv-serving from requirements-serving.lock.
# On Linux without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves a large download.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
SERVE  := .venv-serving

.DEFAULT_GOAL := book
.PHONY: book test lint unit gpu chapters serving browser links env lock clean

book: env
	$(PY) -m tokensel book build

test: unit gpu chapters

# Style, layout, types, and which room may import which.
lint: env
	$(VENV)/bin/ruff check && $(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pyright

# One process a core, each with one thread; a file's tests stay together, they share what they set up. In the order of
# their names: by the number of their tests, the files of one long test would come last, and a core would have none.
unit: env
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The other tests never see a GPU; these are skipped where there is none.
gpu: env
	TOKENSEL_TESTS_ON=gpu $(PY) -m pytest -q tests/test_gpu.py

# Runs what is not up to date, then runs it again and compares every printed output.
chapters: env
	$(PY) -m tokensel book run
	TOKENSEL_UNWATCHED=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile --nbval --nbval-sanitize-with tests/nbval.cfg \
	  --nbval-cell-timeout 1500 -o timeout=1500 _build/chapters

# Starts servers on this machine and asks them. Their tests see nothing of the others, whose packages are missing here.
serving: $(SERVE)/.ready
	PYTHONPATH=tests/serving_engine OMP_NUM_THREADS=1 $(SERVE)/bin/python -m pytest --confcutdir tests/serving_engine tests/serving_engine

# vLLM wants older releases than the book, so it has an environment of its own; no dependency is left to be resolved.
$(SERVE)/.ready: requirements-serving.lock pyproject.toml
	@test -x $(SERVE)/bin/python || $(PYTHON) -m venv $(SERVE)
	@cmp -s requirements-serving.lock $(SERVE)/requirements-serving.lock || { \
	  echo "installing requirements-serving.lock into $(SERVE) (about 2.6 GB)"; \
	  $(SERVE)/bin/python -m pip install --disable-pip-version-check --no-input --quiet --no-deps \
	    -r requirements-serving.lock 2> $(SERVE)/pip.log && cp requirements-serving.lock $(SERVE)/; } || { \
	  echo "error: requirements-serving.lock cannot be installed (see $(SERVE)/pip.log): it needs a network, Python 3.11 on" \
	    "Linux for x86, and PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" >&2; exit 1; }
	@$(SERVE)/bin/python -m pip install --disable-pip-version-check --no-input --quiet --no-deps --no-build-isolation -e .
	@touch $@

# The built book in an installed Chromium: a missing book or browser is an error here, and a skip in `make unit`.
browser: env
	TOKENSEL_BROWSER=required $(PY) -m pytest -n auto tests/book/test_browser.py

# Asks every address outside the book whether it is still there; needs a network.
links: env
	$(PY) -m tokensel book links

env: $(READY)

# Make goes by time; the copy of the lock inside .venv says whether anything in it really changed.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and \
	  f"error: {sys.executable} is Python {v}: tokensel needs 3.11 or newer, give one with make PYTHON=python3.12")'
	@test -x $(PY) || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@cmp -s requirements.lock $(VENV)/requirements.lock || { \
	  echo "installing requirements.lock into $(VENV) (about 2 GB; minutes on a slow line)"; \
	  $(PY) -m pip install --disable-pip-version-check --no-input --quiet -r requirements.lock && \
	  cp requirements.lock $(VENV)/requirements.lock; }
	@$(PY) -m pip install --disable-pip-version-check --no-input --quiet --no-deps --no-build-isolation -e .
	@touch $@

# A new lock from the ranges in pyproject.toml, in an environment of its own.
lock:
	rm -rf _build/lock-env && $(PYTHON) -m venv _build/lock-env
	_build/lock-env/bin/python -m pip install --quiet '.[book,test,lint]' 'setuptools>=77'
	{ sed -n '/^#/p' requirements.lock; _build/lock-env/bin/python -m pip freeze --all --exclude tokensel --exclude pip \
	  | grep -v '^nvidia-\|^triton\|^cuda-' | sed 's/+cpu$$//'; } > _build/requirements.lock
	mv _build/requirements.lock requirements.lock && rm -rf _build/lock-env

clean:
	rm -rf _build
