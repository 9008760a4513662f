# FCN Segment: `make help` lists what there is. Nothing to prepare: on a machine with Python 3.11 or
# newer and pip, each command sets up what it needs, once.
#
# Four environments, because serving must not need torch, nor tests the benchmarks' peers, and the
# two ONNX Runtimes own the same files:
#   .venv-serve  requirements/cpu.txt      what `make serve` runs
#   .venv        requirements/dev.txt      that, training, tests and checks
#   .venv-bench  requirements/bench.txt    the benchmarks' peers; ours is measured in .venv-serve
#   .venv-gpu    requirements/gpu-dev.txt  what serves on a GPU, its tests and benchmarks
# They are made anew when their lock file changes, when this folder was moved, or when their
# interpreter went away. A set-up that was interrupted starts again.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PORT ?= $(or $(FCN_PORT),8000)
DOCKER ?= docker
# 3.11 first: the locked torch is built for it.
PYTHON ?= $(shell for python in python3.11 python3 python3.13 python3.12; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { command -v "$$python"; break; }; done)
# Further arguments: make test ARGS="-k decoding -x", make bench ARGS="--data VOCdevkit"
ARGS ?=

# ---- environments --------------------------------------------------------------------------------

# Without pip inside: `pip --python` fills it from outside, so Debian's python3-venv (ensurepip) is
# not needed. Wheels only: nothing is compiled on the user's machine.
pip = "$(PYTHON)" -m pip --python $(1)/bin/python install --quiet --no-input
# `home` holds where the environment was made: its scripts and the editable install name that path.
here = $(shell $(1)/bin/python -c "print(int(open('$(1)/home').read() == '$(CURDIR)'))" 2>/dev/null)
if-moved = $(if $(filter 1,$(call here,$(1))),,FORCE)

define create
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -m pip --version >/dev/null 2>&1 \
		|| { echo "pip is needed for $(PYTHON) (Debian: apt-get install python3-pip)" >&2; exit 1; }
	@echo "Setting up $(1) from $(2) (once; a minute or so)"
	@rm -rf $(1)
	@"$(PYTHON)" -m venv --without-pip $(1)
	@$(call pip,$(1)) --require-hashes --only-binary :all: -r $(2)
	@printf %s "$(CURDIR)" > $(1)/home
endef

define install
	@$(call pip,$(1)) --no-deps --no-build-isolation --editable .
endef

.venv-serve/locked: requirements/cpu.txt $(call if-moved,.venv-serve)
	$(call create,.venv-serve,requirements/cpu.txt)
	@touch $@

.venv-serve/ready: .venv-serve/locked pyproject.toml
	$(call install,.venv-serve)
	@touch $@

.venv/locked: requirements/dev.txt $(call if-moved,.venv)
	$(torch-is-there)
	$(call create,.venv,requirements/dev.txt)
	@touch $@

.venv/ready: .venv/locked pyproject.toml
	$(call install,.venv)
	@touch $@

.venv-bench/locked: requirements/bench.txt $(call if-moved,.venv-bench)
	$(torch-is-there)
	$(call create,.venv-bench,requirements/bench.txt)
	@touch $@

.venv-bench/ready: .venv-bench/locked pyproject.toml
	$(call install,.venv-bench)
	@touch $@

.venv-gpu/locked: requirements/gpu-dev.txt $(call if-moved,.venv-gpu)
	$(call create,.venv-gpu,requirements/gpu-dev.txt)
	@touch $@

.venv-gpu/ready: .venv-gpu/locked pyproject.toml
	$(call install,.venv-gpu)
	@touch $@

# On Linux the public index's torch is the CUDA build: several GB that no test needs, and pip would
# only notice after the download. So look first whether pip finds the CPU build that is locked.
define torch-is-there
	@if [ "$$(uname -s)" = Linux ]; then \
		"$(PYTHON)" -c 'import platform, sys; sys.exit( \
			(*sys.version_info[:2], platform.machine()) != (3, 11, "x86_64"))' \
		|| { echo "the lock files know torch's CPU build for Python 3.11 on x86-64; this is" \
			"$$("$(PYTHON)" --version) on $$(uname -m): see README, Development" >&2; exit 1; }; \
		versions=$$("$(PYTHON)" -m pip index versions torch 2>/dev/null || true); \
		[[ "$$versions" == *"$(TORCH)+cpu"* ]] \
		|| { echo "pip finds no CPU build of torch $(TORCH): give it PyTorch's index of CPU wheels" \
			"(PIP_EXTRA_INDEX_URL) or a folder that has the wheel (PIP_FIND_LINKS)" >&2; exit 1; }; \
	fi
endef

.PHONY: FORCE
FORCE:

# Commands that the tests run and pip cannot bring, with their Debian package: a C++ compiler, for
# the GPU's kernel on the CPU; a browser and curl, for the web page; Prometheus's own tool, for the
# alerts.
.PHONY: tools
tools:
	$(call tool,c++,g++)
	$(call tool,chromium,chromium)
	$(call tool,curl,curl)
	$(call tool,promtool,prometheus)

define tool
	@command -v $(1) >/dev/null || { echo "Installing $(2)"; \
		as_root=; [ "$$(id -u)" = 0 ] || as_root="sudo -n"; \
		$$as_root apt-get update -qq && $$as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
			apt-get install -qq -y --no-install-recommends $(2) >/dev/null \
		|| { echo "the tests need $(1) (Debian: apt-get install $(2))" >&2; exit 1; }; }
endef

# ---- commands ------------------------------------------------------------------------------------

.PHONY: help serve cluster rollout test fuzz test-gpu coverage check audit format bench bench-quick bench-gpu overload soak lock docker clean

help: ## this list
	@echo "make COMMAND, where COMMAND is one of:"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' Makefile | expand -t 16

serve: .venv-serve/ready ## the service on the CPU with the default model, on PORT (8000)
	@exec .venv-serve/bin/fcn-segment serve --port "$(PORT)"

# Ray's port for changes takes them from whoever has this token. Left alone, Ray gives its workers a
# lower priority than anything else on the machine.
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

test: check tools ## set-up, checks and all tests; ARGS go to pytest
	@.venv/bin/pytest $(ARGS)

fuzz: .venv/ready ## 100,000 damaged image files through the app, at most 14 minutes; ARGS="--cases N --seed S"
	@.venv/bin/python -m tests.fuzz $(ARGS)

test-gpu: .venv-gpu/ready ## the tests that need a GPU; ARGS="--data VOCdevkit" scores fp16 too
	@.venv-gpu/bin/pytest tests/gpu $(ARGS)

# What the tests start in processes of their own is counted too, so they take longer.
coverage: .venv/ready tools ## all tests; fails where less than 95 % of service/'s branches are run
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

# Not among the checks, which any package index will do for: this asks the public one's own database
# of vulnerabilities. Strict, because a mirror that has no such database would pass everything.
audit: .venv/ready ## look the locked packages up among known vulnerabilities; needs the public index
	.venv/bin/pip-audit --strict --disable-pip --require-hashes \
		$(patsubst %,-r %,requirements/cpu.txt requirements/gpu.txt requirements/dev.txt)

format: .venv/ready ## format the code and fix what ruff can fix
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: .venv-bench/ready .venv-serve/ready ## ours against its peers, half an hour on a quiet machine; ARGS as above
	@.venv-bench/bin/python -m tests.benchmarks $(ARGS)

bench-quick: .venv-bench/ready .venv-serve/ready ## ours alone, under three minutes
	@.venv-bench/bin/python -m tests.benchmarks --quick $(ARGS)

# PyTorch with CUDA is measured beside ours where TORCH_PYTHON, or PYTHON, has it.
bench-gpu: .venv-gpu/ready ## the GPU's path against its limits, nine minutes by estimate; ARGS="--quick": two
	@.venv-gpu/bin/python -m tests.benchmarks.gpu --torch-python "$(or $(TORCH_PYTHON),$(PYTHON))" $(ARGS)

overload: .venv/ready ## five times what it can answer for a minute, then kill -9 under load
	@.venv/bin/python -m tests.reliability overload recovery $(ARGS)

soak: .venv/ready ## 20,000 requests of all kinds: nothing may pile up; 20 minutes at most
	@.venv/bin/python -m tests.reliability soak $(ARGS)

docker: ## the CPU image, fcn-segment:cpu
	$(DOCKER) build --target cpu --tag fcn-segment:cpu .

clean: ## remove environments, caches and build output
	rm -rf .venv .venv-serve .venv-bench .venv-gpu .venv-lock build dist *.egg-info .coverage* htmlcov \
		.hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find service models tests docker -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# ---- lock files ----------------------------------------------------------------------------------

UV := 0.13.9
TORCH := 2.13.0
# sha256 of torch-$(TORCH)+cpu-cp311-cp311-manylinux_2_28_x86_64.whl, PyTorch's own CPU wheel. The
# public index lacks it, so uv cannot know its hash: this is `sha256sum` of the file. On Linux it is
# the only hash allowed; with the public ones beside it pip would prefer the CUDA build. Elsewhere
# the public wheels are CPU builds, and their hashes come from the index's metadata.
TORCH_CPU_SHA256 := 6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b

compile = .venv-lock/bin/uv pip compile pyproject.toml --quiet --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-header --group build $(ARGS)

made := by 'make lock' from pyproject.toml; do not edit.

# A line keeps its version unless ARGS says --upgrade or --upgrade-package NAME.
lock: .venv-lock/uv-$(UV) ## resolve requirements/*.txt anew; ARGS go to uv
	$(compile) --universal --extra cpu --extra client --extra tracing --output-file requirements/cpu.txt
	@sed -i "1i # Serving on a CPU. Made $(made)" requirements/cpu.txt
	$(compile) --universal --extra gpu --extra client --extra tracing --constraint requirements/cpu.txt --output-file requirements/gpu.txt
	@sed -i "1i # Serving on an NVIDIA GPU. Made $(made)" requirements/gpu.txt
	$(call lock-with-torch,requirements/dev.txt,dev,Serving on a CPU$(comma) training$(comma) tests and checks,\
		--extra tracing --universal --constraint requirements/cpu.txt)
	$(compile) --universal --extra gpu --group gpu --constraint requirements/gpu.txt \
		--constraint requirements/dev.txt --output-file requirements/gpu-dev.txt
	@sed -i "1i # Tests and benchmarks on an NVIDIA GPU. Made $(made)" requirements/gpu-dev.txt
	@sed -nE '/^opentelemetry/!s/^([^ #].*) \\$$/\1/p' requirements/cpu.txt > .venv-lock/shared.txt
	$(call lock-with-torch,requirements/bench.txt,bench,Benchmarks: the peers and the harness,\
		--python-platform x86_64-manylinux_2_28 --constraint .venv-lock/shared.txt)

comma := ,
# $(1): lock file, $(2): dependency group, $(3): its first line, $(4): platforms and constraints. The
# peers agree on no versions for all platforms, nor on the opentelemetry that ours would take.
# Before the file is resolved, torch is taken out of the old one: uv would copy the hash of the CPU
# wheel from there.
define lock-with-torch
	@touch $(1)
	@awk '/^[^ #]/ { torch = /^torch==/ } !torch' $(1) > .venv-lock/old.txt
	@cp .venv-lock/old.txt $(1)
	$(compile) $(4) --extra cpu --extra train --group $(2) --output-file $(1)
	@{ printf '%s\n' "# $(3). Made $(made)" \
		"# On Linux, PyTorch's own CPU wheel and no other: the reason is in scripts/lock.py." \
		"torch==$(TORCH) ; sys_platform == 'linux' \\" \
		"    --hash=sha256:$(TORCH_CPU_SHA256)"; \
		sed "s/^torch==$(TORCH) /&; sys_platform != 'linux' /" $(1); \
	} > .venv-lock/new.txt
	@cp .venv-lock/new.txt $(1)
endef

.venv-lock/uv-$(UV):
	@rm -rf .venv-lock
	@"$(PYTHON)" -m venv --without-pip .venv-lock
	@$(call pip,.venv-lock) uv==$(UV)
	@touch $@
