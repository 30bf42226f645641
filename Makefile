# Every target sets up what it needs in .venv; nothing has to be installed before.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOS := $(wildcard proto/secagg/wire/v1/*.proto)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow docs lint proto proto-check bench bench-smoke gallery privacy recommender \
	simulate fuzz promises network load soak dashboards images scenario lock audit release clean

help: ## Show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: set PYTHON=..."; exit 1; }
	@echo "Setting up $(VENV): a minute or two, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

setup: $(STAMP) ## Create .venv with everything needed for development

demo: $(STAMP) ## Encrypted federated training on real data, with a report in runs/latest
	$(BIN)/secagg demo

# One thread each: there are as many workers as cores, and they would wait for one another.
test: $(STAMP) lint proto-check ## Lint, type-check, and run the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m 'not slow'

# They wait more than they compute.
test-slow: $(STAMP) ## Run the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 4 --dist loadfile -m slow --timeout 600

docs: $(STAMP) ## Build the documentation site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 PYTHONWARNINGS=ignore $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

lint: $(STAMP) ## Style, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m deploy.release check

proto: $(STAMP) ## Regenerate the message and service code from proto/
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -I proto --grpc_python_out=. $(filter %_service.proto,$(PROTOS))

proto-check: $(STAMP) ## Lint proto/ and check that the committed code is what it generates
	$(BIN)/buf lint proto
	rm -rf build/proto && mkdir -p build/proto
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=build/proto --pyi_out=build/proto $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -I proto --grpc_python_out=build/proto $(filter %_service.proto,$(PROTOS))
	diff -r -x __init__.py -x __pycache__ build/proto/secagg/wire/v1 secagg/wire/v1

bench: $(STAMP) ## Measure everything beside the alternatives, into pages and figures (40 minutes; slow lines need root)
	$(BIN)/secagg-bench run
	$(BIN)/python -m secagg_bench.check_cost --output bench/results/check_cost.json
	$(BIN)/python -m secagg_bench.suite.figures
	$(BIN)/python -m secagg_bench.readme

bench-smoke: $(STAMP) ## Run every scenario of the benchmark suite on a toy (minutes)
	$(BIN)/secagg-bench run --smoke --output build/bench-smoke

gallery: $(STAMP) ## Measure what poisoning does and what stops it (needs SECAGG_DATA_DIR, minutes)
	$(BIN)/python -m secagg_bench.gallery.run

privacy: $(STAMP) ## Measure what privacy costs, and attacks with and without it (needs SECAGG_DATA_DIR, an hour)
	$(BIN)/python -m secagg_bench.noise_cost --output bench/results/noise_cost.json
	$(BIN)/python -m secagg_bench.private_checks --output bench/results/private_checks.json
	$(BIN)/python -m secagg_bench.privacy --table docs/privacy-results.md
	$(BIN)/python -m secagg_bench.readme

recommender: $(STAMP) ## Measure what the recommender reaches, and draw its catalogue (needs SECAGG_DATA_DIR, hours)
	$(BIN)/python -m secagg_bench.recommender.one_round
	$(BIN)/python -m secagg_bench.recommender.sessions
	$(BIN)/python -m secagg_bench.recommender.cold_start
	$(BIN)/python -m secagg_bench.recommender.latency run
	$(BIN)/python -m secagg_bench.recommender.figures docs
	$(BIN)/python -m secagg_bench.recommender

simulate: $(STAMP) ## Simulate 100,000 operations under faults, or go on to that (ten minutes)
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support $(BIN)/python -m simulation --output bench/results/simulation.json
	$(BIN)/python -m secagg_bench.readme

fuzz: $(STAMP) ## Fuzz decoders for a while, into bench/results/fuzz.json (TARGETS="wire server" SECONDS=1800)
	PYTHONPATH=tests/support $(BIN)/python -m fuzz $(TARGETS) --seconds $(or $(SECONDS),60)
	$(BIN)/python -m secagg_bench.readme

promises: $(STAMP) ## Take out what carries each promise, and see its tests fail (half an hour)
	$(BIN)/python tests/support/promises.py run
	$(BIN)/python tests/support/promises.py write

network: $(STAMP) ## Break the network between real hosts, and measure how long recovery takes (root, 20 minutes)
	$(BIN)/python -m secagg_bench.network --output bench/results/network.json
	$(BIN)/python -m secagg_bench.readme

load: $(STAMP) ## Measure 200 clients that upload at once, and attackers beside them (five minutes)
	$(BIN)/python -m secagg_bench.load uploads
	$(BIN)/python -m secagg_bench.load hostile
	$(BIN)/python -m secagg_bench.load draw
	$(BIN)/python -m secagg_bench.readme

soak: $(STAMP) ## Run rounds for an hour, and measure what the programs hold after it
	$(BIN)/python -m secagg_bench.load soak
	$(BIN)/python -m secagg_bench.load draw
	$(BIN)/python -m secagg_bench.readme

dashboards: $(STAMP) ## Write dashboards and alert rules from the metric lists
	$(BIN)/python -m deploy.monitoring.generate

images: $(STAMP) ## Build the images without a registry, look into them, run them (root, podman, debootstrap; 10 minutes)
	$(BIN)/python -m deploy.rehearsal --output bench/results/images.json
	$(BIN)/python -m deploy.rehearsal.by_hand

scenario: $(STAMP) ## Run compose.yaml, with a client cut off and back, and more (root, Docker, minutes; after `images`)
	$(BIN)/python deploy/rehearsal/scenario.py

lock: $(STAMP) ## Write the images' lock files from pyproject.toml (UPGRADE=--upgrade for the newest)
	$(BIN)/python -m deploy.release lock $(UPGRADE)

audit: $(STAMP) ## Look up known vulnerabilities of what is locked and installed (needs a network)
	$(BIN)/python -m deploy.release audit

release: $(STAMP) ## Wheel, source distribution, bills of materials and checksums of the newest commit, in dist/
	$(BIN)/python -m deploy.release make

clean: ## Remove everything that was generated or installed
	rm -rf $(VENV) build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
