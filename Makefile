# Every command of the project. `make setup` is part of each and does nothing when all is there.
.DEFAULT_GOAL := help
.PHONY: help setup shim demo bench soak check format manifests test test-unit test-root test-cluster \
	coverage-each fuzz drills clean

BIN := .venv/bin
C_FILES := $(wildcard bpf/*.c bpf/include/*.h bpf/tests/*.c bpf/tests/*.h agent/bench/*.c cni/*.c \
	cni/*.h tests/unit/cni/*.c tests/cluster/node/*.c tests/support/*.c)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' Makefile

setup: ## install the Debian packages and the virtual environment (root)
	@scripts/setup.sh

shim: ## build the CNI plugin, cni/shim
	@scripts/build_shim.sh

demo: setup ## see it work, with evidence (root)
	@$(BIN)/sidestep demo

bench: setup ## measure the mesh beside no mesh and beside Envoy (root; a few minutes)
	@$(BIN)/python -m pip install -q --group bench
	@mkdir -p build
	$(BIN)/sidestep bench --plot build/bench.png $(BENCH)

SECONDS ?= 3600
soak: setup ## traffic of every kind for an hour, and nothing may stay (root; SECONDS=... for less)
	@$(BIN)/python -m scripts.soak $(SECONDS)

check: setup ## format, lint, types, layers, spelling: what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(if $(C_FILES),clang-format --dry-run --Werror $(C_FILES))
	shellcheck scripts/*.sh tests/cluster/*.sh tests/cluster/node/*.sh .ci/run
	$(BIN)/codespell
	# Versions of Debian's packages are not pinned: a build takes the security updates of its day.
	$(BIN)/hadolint --ignore DL3008 deploy/Dockerfile

format: setup ## rewrite sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(if $(C_FILES),clang-format -i $(C_FILES))

test: setup ## every test but those of a cluster, against this machine's kernel (root)
	REQUIRE_ROOT=1 $(BIN)/pytest -m 'not cluster'

test-unit: setup ## the tests that need neither root nor BPF
	$(BIN)/pytest -m 'not root and not cluster'

test-root: setup ## the tests that need root and BPF
	REQUIRE_ROOT=1 $(BIN)/pytest -m root

test-cluster: setup ## the tests against a real Kubernetes, which is built the first time (minutes)
	@tests/cluster/build.sh
	@tests/cluster/image.sh
	REQUIRE_ROOT=1 $(BIN)/pytest -m cluster tests/cluster

drills: setup ## break things, and write docs/reliability.md (root; minutes; DRILLS="-k NAME" for some)
	REQUIRE_ROOT=1 DRILLS_REPORT=docs/reliability.md $(BIN)/pytest tests/drills $(DRILLS)

manifests: setup ## render the chart as deploy/manifests
	scripts/render_manifests.sh "$$(tests/cluster/build.sh)/helm" deploy/manifests

coverage-each: setup ## every branch of each pure module, by its own test file
	$(BIN)/python -m scripts.coverage_each

fuzz: setup ## fuzz what takes bytes from outside (FUZZ="TARGET... --seconds N"; a minute each)
	@$(BIN)/python -m pip install -q --group fuzz
	$(BIN)/python -m scripts.fuzz $(FUZZ)

clean: ## remove what the targets made here
	rm -rf cni/shim .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis sidestep.egg-info
