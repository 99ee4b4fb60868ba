# Every command here works on a machine that has Python 3.11 or later and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PRECISION ?= int4
DEMO_MODEL := models/demo/model
DEMO_ARTIFACT := artifacts/demo-$(PRECISION)
ARTIFACT ?= $(DEMO_ARTIFACT)
LAMBDA_CONTEXT ?= dist/lambda

.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(DEMO_ARTIFACT)/manifest.json  ## export the demo model, serve it, stream one answer, print its usage record
	@$(BIN)/python models/demo/demo.py $(DEMO_ARTIFACT)

test: $(VENV)/ready  ## run the whole test suite
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

soak: $(VENV)/ready  ## run the long fault runs, about ten minutes each
	@$(BIN)/python -m pytest -m soak -s $(PYTEST_ARGS)

clients: $(VENV)/ready  ## install the clients that the end-to-end tests run in an environment of their own
	@test -x .venv-clients/bin/python || $(BIN)/python -m venv .venv-clients
	@for client in "litellm mcp" langchain-openai tinfoil-ehbp; do \
		.venv-clients/bin/python -m pip --disable-pip-version-check --quiet install $$client || exit 1; done
	@command -v npm > /dev/null && npm install --silent --no-fund --no-audit --prefix .venv-clients/node ehbp openai \
		|| echo "npm is not there: the tests of its clients are left out"

ray:  ## install Ray Serve into an environment of its own, for the cluster demo and its tests
	@test -x .venv-ray/bin/python || $(PYTHON) -m venv .venv-ray
	@.venv-ray/bin/python -m pip --disable-pip-version-check --quiet install --editable '.[cpu,postgres,ray]' httpx

cluster-demo: ray $(DEMO_ARTIFACT)/manifest.json  ## a Ray cluster on this machine: one node killed, one drained, 200 streams (needs root, PostgreSQL)
	@PYTHONPATH=functions/ray_app:bench:tests .venv-ray/bin/python bench/cluster_demo.py $(DEMO_ARTIFACT) $(CLUSTER_ARGS)

check: $(VENV)/ready  ## lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy runtime export tests models/demo functions
	@$(BIN)/python -m pytest -q tests/test_import_law.py

export: $(VENV)/ready  ## make export MODEL=<hub id or directory> [REVISION=...] [PRECISION=int4|int8|w8a8|hybrid|fp16|fp32] [OUT=...]
	@test -n "$(MODEL)" || { echo "make export: name a model, as in: make export MODEL=$(DEMO_MODEL)" >&2; exit 2; }
	@$(BIN)/pilotlight export "$(MODEL)" --precision $(PRECISION) $(if $(REVISION),--revision "$(REVISION)") $(if $(OUT),--out "$(OUT)")

bench: $(VENV)/ready  ## measure speed beside the peers that are installed (bench/README.md; BENCH_ARGS="--model smollm2-135m --rounds 3")
	@$(PIP) install --editable '.[bench]'
	@$(BIN)/python bench/run.py $(BENCH_ARGS)

gpu-check: $(VENV)/ready  ## check and measure this machine's NVIDIA GPU; without one, say so (GPU_ARGS="--models demo")
	@$(BIN)/python bench/gpu_check.py $(GPU_ARGS)

deploy-modal: $(VENV)/ready  ## build the wheel, put the artifact of pilotlight.toml on a Modal volume, and deploy (docs/modal.md)
	@$(PIP) install --editable '.[modal]'
	@rm -rf dist/modal
	@$(PIP) wheel --no-deps --wheel-dir dist/modal .
	@$(BIN)/modal run functions/modal_app/app.py::upload
	@$(BIN)/modal deploy functions/modal_app/app.py

demo-model: $(VENV)/ready  ## train the demo model again from nothing (about an hour on 2 cores)
	@$(BIN)/python models/demo/train.py

package: $(VENV)/ready  ## build the wheel into dist/, or with TARGET=lambda [ARTIFACT=...] the context of an image into dist/lambda/
ifeq ($(TARGET),lambda)
	@test -f $(ARTIFACT)/manifest.json || { echo "make package: $(ARTIFACT) is no artifact; see make export" >&2; exit 2; }
	@rm -rf $(LAMBDA_CONTEXT) && mkdir -p $(LAMBDA_CONTEXT)/aws_lambda
	@$(PIP) wheel --no-deps --wheel-dir $(LAMBDA_CONTEXT) .
	@cp functions/aws_lambda/*.py $(LAMBDA_CONTEXT)/aws_lambda
	@cp -r $(ARTIFACT) $(LAMBDA_CONTEXT)/artifact
	@cp infra/lambda/Containerfile $(LAMBDA_CONTEXT)
	@printf '[functions."%s"]\nartifact = "/opt/artifact"\n' $(notdir $(abspath $(ARTIFACT))) > $(LAMBDA_CONTEXT)/pilotlight.toml
	@chmod -R a+rX $(LAMBDA_CONTEXT)
	@du --summarize --human-readable --apparent-size $(LAMBDA_CONTEXT)/*
	@du --summarize --human-readable --apparent-size $(LAMBDA_CONTEXT)
else
	@$(PIP) wheel --no-deps --wheel-dir dist .
endif

sam-validate: .venv-sam/bin/sam  ## check the SAM template with AWS's own tool, in a virtual environment of its own
	@SAM_CLI_TELEMETRY=0 AWS_DEFAULT_REGION=us-east-1 .venv-sam/bin/sam validate --lint --template infra/lambda/template.yaml

# its pins and ours cannot be in one environment
.venv-sam/bin/sam:
	@$(PYTHON) -m venv .venv-sam
	@.venv-sam/bin/pip install --quiet --disable-pip-version-check aws-sam-cli

clean:  ## remove everything that was built here
	rm -rf $(VENV) artifacts dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(DEMO_ARTIFACT)/manifest.json: $(VENV)/ready
	@test -f $@ || $(BIN)/pilotlight export $(DEMO_MODEL) --precision $(PRECISION) --out $(DEMO_ARTIFACT)

# torch first and alone: pip then takes the CPU build where one is offered, and nothing pulls another one afterwards.
$(VENV)/ready: pyproject.toml
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) install torch==2.13.0
	@$(PIP) install --editable '.[cpu,export,dev]'
	@touch $@

.PHONY: help demo test soak ray cluster-demo check export bench gpu-check deploy-modal demo-model package sam-validate clean
