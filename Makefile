# Every target makes .venv first when it is missing or out of date (.ci/venv.sh; a second call costs 30 ms).
#   GPU=1          plain vllm for CUDA instead of the CPU build; remembered until GPU=0
#   PYTHON=...     interpreter that makes .venv (3.11 or newer)
#   TORCH_INDEX=...  package index of CPU builds of torch; empty leaves it out
#   ARGS='...'     passed on: `make demo ARGS='run.seed=2'`, `make test ARGS='-k advantages -x'`

.DEFAULT_GOAL := help
.PHONY: help .venv demo test lint types docs ablation clean

RUN := .venv/bin/python
SOURCES := adapters trainer rollout rlhf recipes tests .ci

help: ## list the targets
	@sed -n 's/^\([.a-z]*\):.*## /  make \1: /p' $(MAKEFILE_LIST)

.venv: ## make the environment when it is missing or out of date
	@bash .ci/venv.sh $(if $(GPU),$(if $(filter 0,$(GPU)),cpu,gpu))

demo: .venv ## teach SmolLM2-135M to add, on this machine
	@.venv/bin/rlhf train dapo/arithmetic $(ARGS)

test: .venv ## run the tests
	@$(RUN) -m pytest -n 2 --dist loadfile $(ARGS)

lint: .venv ## check style and formatting
	@$(RUN) -m ruff check $(SOURCES)
	@$(RUN) -m ruff format --check $(SOURCES)

types: .venv ## check types
	@$(RUN) -m mypy

docs: .venv ## write the pages that are generated from the code
	@$(RUN) -m rlhf.config_reference > .venv/page && mv .venv/page docs/configuration.md
	@$(RUN) -m rlhf.metrics > .venv/page && mv .venv/page docs/metrics.md

ablation: .venv ## DAPO without each of its parts, at equal generated tokens (hours; goes on where it was stopped)
	@$(RUN) -m tests.benchmarks.ablation --jobs 2 $(ARGS)

clean: ## remove the environment and caches; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find adapters trainer rollout rlhf recipes tests -name __pycache__ -prune -exec rm -rf {} +
