# make demo      a first run from nothing: environment, built-in corpus, training, report
# make test      the tests a newcomer runs (under 10 minutes on two cores)
# make test-slow the tests that it leaves out
# make test-all  all tests
# make test-oldest, test-newest   with the oldest and the newest supported versions, each in an environment of its own
# make mutants MODULE=accent_plugin/pooling.py   small errors in a module that its tests do not notice (2 to 20 minutes)
# make lint      ruff, yamllint, mypy and import-linter; pre-commit runs them before a commit: see .pre-commit-config.yaml

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
DEMO := data/demo

# Threads that wait by spinning make a step five times slower on a machine that has other work to do.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help env demo test test-slow test-all test-oldest test-newest mutants lint

help:
	@sed -n 's/^# make/make/p' Makefile

# The stamp is newer than everything the environment is made from, so that a second call has nothing to do.
env: $(VENV)/.done

$(VENV)/.done: setup.py constraints.txt
	@echo "Making the environment in $(VENV) (about 4.5 GB with PyTorch)."
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + "; choose another: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[test,lint]'
	@touch $@

demo: env
	@echo "1/2  The built-in corpus of synthetic speech and a tiny encoder with random weights, in $(DEMO)."
	$(BIN)/python -m accent_plugin.corpus.synthetic --out $(DEMO)/corpus --encoder $(DEMO)/encoder
	@echo "2/2  Training and evaluation with the recipe; a finished run is only evaluated again."
	$(BIN)/python recipes/CommonVoiceAccent/train.py hparams/wav2vec2_base.yaml $(DEMO_OVERRIDES)
	@echo "The report is results/demo/1986/report/report.md (or report.html in a browser)."

# The corpus is small and nothing is pretrained: higher rates, shorter stretches of speech, fewer epochs.
DEMO_OVERRIDES = --name demo --data_folder $(DEMO)/corpus --wav2vec2_hub $(DEMO)/encoder \
	--accents "[us, england, scotland]" --pooling attentive_statistics --number_of_epochs 4 --crop_seconds 4 \
	--batch_seconds 32 --lr_encoder 0.001 --lr_head 0.002 --lr_schedule cosine --max_grad_norm 1.0 --num_workers 1

# A file's tests share what they prepare, and files keep the order of tests/conftest.py, in which the longest are first.
SHARED := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# A thread for each worker: more would wait for each other.
test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(SHARED)

test-slow: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(SHARED)

test-all: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED)

# In place of constraints.txt, which holds one version of everything; only torch has to be of torchaudio's release.
test-oldest: VENV := .venv-oldest
test-oldest:
	$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet uv
	grep '^torch' constraints.txt | cat - constraints-oldest.txt > $(VENV)/constraints.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint $(VENV)/constraints.txt --editable '.[test]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(SHARED)

test-newest: VENV := .venv-newest
test-newest:
	$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet uv
	grep '^torch' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/uv pip install --quiet --upgrade --python $(BIN)/python --constraint $(VENV)/constraints.txt --editable '.[test]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(SHARED)

# Tests mirror the package's folders; where others test a module: make mutants MODULE=... TESTS="tests/test_one.py ...".
TESTS ?= $(patsubst accent_plugin/%,tests/%,$(dir $(MODULE)))test_$(notdir $(MODULE))
MOST ?= 50

# mutmut is installed here alone: nothing else needs it.
mutants: env
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt mutmut==3.8.1
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutate.py $(MODULE) $(TESTS) --most $(MOST)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/yamllint .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pre-commit validate-config
