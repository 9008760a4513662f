# `make help` lists the commands. Each sets up what it needs, once; that takes Python 3.11 or newer and
# pip. There are four environments, because serving must not need torch, the tests must not need the
# benchmarks' peers, and the two ONNX Runtimes own the same files:
#   .venv-serve  requirements/cpu.txt      for `make serve`
#   .venv        requirements/dev.txt      for serving, training, tests and checks
#   .venv-bench  requirements/bench.txt    for the benchmarks' peers; ours is measured in .venv-serve
#   .venv-gpu    requirements/gpu-dev.txt  for serving on a GPU, its tests and benchmarks

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PORT ?= $(or $(FCN_PORT),8000)
DOCKER ?= docker
# 3.11 first, because the locked torch is built for it.
PYTHON ?= $(shell for python in python3.11 python3 python3.13 python3.12; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { command -v "$$python"; break; }; done)
# Further arguments: make test ARGS="-k decoding -x", make bench ARGS="--data VOCdevkit"
ARGS ?=

.PHONY: help serve cluster rollout test test-fast test-long test-lowest fuzz test-gpu coverage check audit \
	format bench bench-quick bench-gpu overload soak attack lock docker clean tools python FORCE

help: ## this list
	@echo "make COMMAND, where COMMAND is one of:"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' Makefile | expand -t 16

# ---- environments --------------------------------------------------------------------------------

python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3" >&2; exit 1; }

.venv-serve/ready: lock = cpu
.venv/ready: lock = dev
.venv-bench/ready: lock = bench
.venv-gpu/ready: lock = gpu-dev
# The script sets an environment up, or again, or does nothing and leaves `ready` as it is.
.venv-serve/ready .venv/ready .venv-bench/ready .venv-gpu/ready: python FORCE
	@"$(PYTHON)" scripts/environment.py $(@D) requirements/$(lock).txt

FORCE:
tools: .venv/ready
	@scripts/tools.sh .venv/bin

# ---- serving -------------------------------------------------------------------------------------

serve: .venv-serve/ready ## the service on the CPU with the default model, on PORT (8000)
	@exec .venv-serve/bin/fcn-segment serve --port "$(PORT)"

# Ray accepts changes on its port from anyone who has this token. By default Ray gives its workers a
# lower priority than everything else on the machine.
cluster-env = RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$(CURDIR)/.venv/ray-token"
config = $(or $(ARGS),docker/cluster.yaml)

.venv/ray-token: .venv/ready
	@umask 077; "$(PYTHON)" -c 'import secrets; print(secrets.token_hex(32), end="")' > $@

cluster: .venv/ray-token ## on Ray Serve with two CPU devices, on PORT (8000); ARGS=FILE: another Serve config
	@sed 's/^\(  port: \)8000$$/\1$(PORT)/' $(config) > .venv/cluster.yaml
	@echo "Starting; then http://127.0.0.1:$(PORT)"
	@exec env $(cluster-env) .venv/bin/serve run .venv/cluster.yaml

rollout: .venv/ray-token ## apply a changed docker/cluster.yaml, or ARGS=FILE, to what `make cluster` runs
	@sed 's/^\(  port: \)8000$$/\1$(PORT)/' $(config) > .venv/cluster.yaml
	@env $(cluster-env) .venv/bin/serve deploy .venv/cluster.yaml

docker: ## the CPU image, fcn-segment:cpu
	$(DOCKER) build --target cpu --tag fcn-segment:cpu .

# ---- tests and checks ----------------------------------------------------------------------------

test: check tools ## set-up, checks and all tests; ARGS go to pytest
	@.venv/bin/pytest $(ARGS)

test-fast: .venv/ready ## the quick unit tests and one real request, under a minute; ARGS go to pytest
	@.venv/bin/pytest -m "not slow" tests/unit tests/integration/test_serve.py::test_a_photo_over_the_wire $(ARGS)

test-long: .venv/ready ## the rarest and longest tests, two minutes, which `make test` leaves out
	@.venv/bin/pytest -m long $(ARGS)

lowest-tests = $(patsubst %,tests/integration/test_%.py,api api_errors http serve) \
	$(patsubst %,tests/unit/test_%.py,access batcher cli connections contract logs metrics \
	negotiation problems session settings supervisor watchdog)

test-lowest: python ## the API's and server's tests on the lowest allowed dependencies; ARGS go to pytest
	@"$(PYTHON)" scripts/lock.py --lowest .venv-lock/lowest.txt
	@"$(PYTHON)" scripts/environment.py .venv-lowest .venv-lock/lowest.txt
	@.venv-lowest/bin/pytest -m "not slow" $(lowest-tests) $(ARGS)

test-gpu: .venv-gpu/ready ## the tests that need a GPU; ARGS="--data VOCdevkit" scores fp16 too
	@.venv-gpu/bin/pytest tests/gpu $(ARGS)

fuzz: .venv/ready ## 100,000 damaged image files through the app, at most 14 minutes; ARGS="--cases N --seed S"
	@.venv/bin/python -m tests.fuzz $(ARGS)

# It also counts the processes that the tests start, so the tests take longer.
coverage: .venv/ready tools ## all tests; fails if they run less than 95 % of service/'s branches
	@.venv/bin/coverage erase
	@.venv/bin/coverage run -m pytest $(ARGS)
	@.venv/bin/coverage combine --quiet
	@.venv/bin/coverage report

check: .venv/ready ## linters, types, import rules
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/hadolint Dockerfile

# Not part of `check`, which works with any package index: this queries the public index's own
# database of vulnerabilities. Strict, because an index without that database would pass everything.
audit: .venv/ready ## look the locked packages up among known vulnerabilities; needs the public index
	.venv/bin/pip-audit --strict --disable-pip --require-hashes \
		$(patsubst %,-r requirements/%.txt,cpu gpu dev)

format: .venv/ready ## format the code and fix what ruff can fix
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# ---- measurements --------------------------------------------------------------------------------

bench: .venv-bench/ready .venv-serve/ready ## ours against its peers, half an hour on a quiet machine; ARGS as above
	@.venv-bench/bin/python -m tests.benchmarks $(ARGS)

bench-quick: .venv-bench/ready .venv-serve/ready ## ours alone, under three minutes
	@.venv-bench/bin/python -m tests.benchmarks --quick $(ARGS)

# If TORCH_PYTHON, or PYTHON, has PyTorch with CUDA, it is measured too.
bench-gpu: .venv-gpu/ready ## the GPU's path against its limits, nine minutes by estimate; ARGS="--quick": two
	@.venv-gpu/bin/python -m tests.benchmarks.gpu --torch-python "$(or $(TORCH_PYTHON),$(PYTHON))" $(ARGS)

overload: .venv/ready ## five times what it can answer for a minute, then kill -9 under load
	@.venv/bin/python -m tests.reliability overload recovery $(ARGS)

soak: .venv/ready ## 20,000 requests of all kinds: nothing may pile up; 20 minutes at most
	@.venv/bin/python -m tests.reliability soak $(ARGS)

attack: .venv/ready ## 10,000 hostile requests, known attacks, kills and mix-ups, 20 minutes by estimate; ARGS="cases --cases N"
	@.venv/bin/python -m tests.attack $(ARGS)

# ---- upkeep --------------------------------------------------------------------------------------

# A package keeps its version unless ARGS has --upgrade or --upgrade-package NAME.
lock: python ## resolve requirements/*.txt again; ARGS go to uv
	@"$(PYTHON)" scripts/lock.py $(ARGS)

clean: ## remove environments, caches and build output
	rm -rf .venv .venv-serve .venv-bench .venv-gpu .venv-lock .venv-lowest build dist *.egg-info .coverage* \
		htmlcov .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find service models tests docker scripts -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
