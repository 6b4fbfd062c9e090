# Commands of this project; `make` alone lists them. They need Python 3.11 to 3.13 and a package index.
PYTHON ?= python3
OPTIONS ?=
# The versions of packages: those of the commit; with NEWEST=1 the newest; with LOWEST=1 the lowest of pyproject.toml.
NEWEST ?=
LOWEST ?=
# SLOW=1 also runs the tests that only `test-all` needs.
SLOW ?=
$(if $(and $(NEWEST),$(LOWEST)),$(error choose NEWEST=1 or LOWEST=1))
VENV := .venv$(if $(NEWEST),-newest)$(if $(LOWEST),-lowest)
LOCK := $(if $(NEWEST)$(LOWEST),,deploy/lock/dev.txt)
BIN := $(VENV)/bin
# The newest packages are resolved once a day.
STAMP := $(VENV)/.installed$(if $(NEWEST),-$(shell date +%F))
CUDA := $(VENV)/cuda
# Empty where the CUDA provider of ONNX Runtime does not exist.
CUDA_STAND_IN := $(if $(and $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(shell command -v gcc)),cuda-stand-in)
SOAK ?= --seconds 300
TARGET ?= cpu
WHEELS ?=
CARRY ?= build/gpu
GPU_VENV := .venv-gpu
# Placeholders that download NVIDIA's wheels from NVIDIA's index, with build tools that only isolation gives them.
TENSORRT := tensorrt-cu13>=11,<12
# It measures the packages of its machine, whatever their versions are.
GPU_INSTALL = env -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT $(GPU_VENV)/bin/python -m pip install --quiet $(if $(WHEELS),--no-index --find-links $(WHEELS))
# Nice, as `wheel-test` is: it runs while tests wait. The annotations of old libraries differ.
TYPES := $(if $(LOWEST),,types)
# As many workers as cores, because most tests compute.
WORKERS = $(shell $(PYTHON) -c 'import os; print(os.cpu_count() or 1)')
COMPILE := env -u UV_CONSTRAINT -u UV_BUILD_CONSTRAINT -u UV_RESOLUTION $(BIN)/uv pip compile --quiet --universal \
	--python-version 3.11 --upgrade --no-header --no-annotate --no-emit-index-url --no-emit-find-links $(OPTIONS)
HASHED := $(COMPILE) --generate-hashes
# What the environment of this project contains.
EXTRAS := cpu train tensorboard otel sign s3 ray batch docs dev
EMPTY :=
COMMA := ,
INSTALLED := .[$(subst $(EMPTY) ,$(COMMA),$(EXTRAS))]
# Its packages do not fit the environment. It is the same for all versions of the others.
STAND_IN := env UV_CONSTRAINT=deploy/lock/cuda-stand-in.txt UV_RESOLUTION=highest $(BIN)/uv pip install --quiet --no-deps --target
# The same bytes for the same commit: its time, and locked build tools.
BUILD = env SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/uv build --build-constraints deploy/lock/build.txt --require-hashes
# An environment with nothing but the wheel and some extras; `--exact` removes what the extras before needed.
ALONE := env -u PYTHONPATH nice .venv/bin
# uv resolves only the lowest versions of what it is asked for, not those of a wheel's dependencies.
ALONE_CONSTRAINT = $(addprefix ../../,$(LOCK)$(if $(LOWEST),$(VENV)/lowest.txt))
INSTALL_ALONE = UV_CONSTRAINT=$(ALONE_CONSTRAINT) UV_BUILD_CONSTRAINT=$(ALONE_CONSTRAINT) nice ../../$(BIN)/uv pip install --quiet --exact --python .venv/bin/python "$$(ls sopdeploy-*.whl)
EVERY_COMMAND = $(ALONE)/python ../../deploy/every_command.py bundles/latest
# Unit tests that start no other process; `make quick` runs them.
UNIT := $(addprefix tests/sopdeploy/,base layers models/test_backbones.py images data bundle evaluation) \
	tests/service/http tests/service/decoding/test_decode.py tests/sweep/test_goldens.py

export OMP_WAIT_POLICY := PASSIVE
# Every pip and uv that a target starts uses these, also to build a package.
ifneq ($(LOCK),)
# A relative path, because these are lists separated by spaces.
export UV_CONSTRAINT := $(LOCK)
export UV_BUILD_CONSTRAINT := $(LOCK)
export PIP_CONSTRAINT := $(LOCK)
export PIP_BUILD_CONSTRAINT := $(LOCK)
endif
ifneq ($(LOWEST),)
export UV_RESOLUTION := lowest-direct
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1
# uv does not compile to bytecode. Without a bytecode cache every process that a test starts compiles torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo quick test test-all test-nightly fuzz check lint types contracts unit tests cuda-stand-in goldens format docs \
	pictures site gpu-bundles gpu-wheels gpu-check soak dist wheel-test samples-test alerts-test extras-test install-test container-test container-base audit sbom release lock clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## train on photos and on digits, export with proof, serve, and classify over HTTP
	$(BIN)/sopdeploy demo

quick: $(STAMP)  ## format, lint, types, import contracts and unit tests, in under 90 seconds
	$(MAKE) --jobs=2 types lint contracts unit

test: $(STAMP)  ## format, lint, import contracts and the tests of every main job: whether an installation or a change works
	$(MAKE) lint contracts
	$(MAKE) tests

test-all: $(STAMP)  ## `test` with all tests that CI runs, also in Chromium and on a stand-in for CUDA, types, and the wheel
	$(MAKE) --jobs=2 $(CUDA_STAND_IN) lint contracts
	$(MAKE) --jobs=2 tests $(TYPES) wheel-test SLOW=1

test-nightly: $(STAMP)  ## the other networks, recipes and sizes, and what needs compilers or package servers: an hour and a half
	$(BIN)/pytest --nightly -m nightly

fuzz: $(STAMP)  ## the property tests with new random examples; a failure prints how to reproduce it
	$(BIN)/pytest -n $(WORKERS) --hypothesis-profile=fuzz -m hypothesis

check: lint types contracts

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	nice $(BIN)/mypy

contracts: $(STAMP)
	nice $(BIN)/lint-imports

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest --quiet -n auto --dist loadfile $(UNIT)

tests: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --durations=10 --durations-min=5 $(if $(SLOW),--slow)

cuda-stand-in: $(CUDA)/.built  ## ONNX Runtime with CUDA and torch-tensorrt, on a stand-in for CUDA; needs gcc, 260 MB

$(CUDA)/.built: $(STAMP) deploy/lock/cuda-stand-in.txt tests/cuda/build.py tests/cuda/cudart.c
	$(STAND_IN) $(CUDA) onnxruntime-gpu
	$(STAND_IN) $(CUDA)/headers nvidia-cuda-runtime nvidia-cuda-crt
	$(STAND_IN) $(CUDA)/torch-tensorrt torch-tensorrt-rtx dllist psutil
	$(STAND_IN) $(CUDA)/bindings tensorrt-cu13-bindings
	$(BIN)/python tests/cuda/build.py $(CUDA)
	touch $@

goldens: $(STAMP)  ## rewrite tests/goldens; review the diff
	$(BIN)/pytest --rewrite-goldens -k golden tests/sweep/test_goldens.py tests/sopdeploy

format: $(STAMP)  ## format the code and apply ruff's automatic fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## rewrite the generated pages of docs/
	$(BIN)/python docs/generate.py

pictures: $(STAMP)  ## create the screenshots and the chart of the README; needs Chromium
	$(BIN)/python docs/generate_pictures.py

site: $(STAMP)  ## build docs/ as a site; open build/site/index.html
	$(BIN)/mkdocs build --strict

# In its own environment, which also sees the packages of $(PYTHON), such as torch: a GPU server may have no package
# index. The .pth file is for a $(PYTHON) that is itself a virtual environment. Before Python 3.12, `venv` adds an old
# setuptools, which would hide the one that torch needs.
$(GPU_VENV)/.installed: pyproject.toml
	@nvidia-smi --list-gpus 2>/dev/null | grep -q . || \
		{ echo "gpu-check: nvidia-smi lists no GPU; run it on a machine with an NVIDIA GPU and its driver" >&2; exit 2; }
	$(PYTHON) -m venv --system-site-packages $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip uninstall --quiet --yes setuptools
	$(PYTHON) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(GPU_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/outer.pth"
	$(GPU_INSTALL) hatchling editables
	$(GPU_INSTALL) --no-build-isolation --editable '.[gpu-check]'
	$(GPU_INSTALL) '$(TENSORRT)' || echo "TensorRT cannot be installed here; its commands fail"
	touch $@

gpu-bundles: $(STAMP)  ## export what gpu-check needs to CARRY=FOLDER, by default build/gpu; needs no GPU
	$(BIN)/python benchmarks/gpu_bundles.py $(CARRY)

gpu-wheels:  ## download to WHEELS=FOLDER what gpu-check needs beside the packages of $(PYTHON)
	$(PYTHON) deploy/gpu_wheels.py $(or $(WHEELS),$(error gpu-wheels: add WHEELS=FOLDER))

# What failed does not stop the rest, because time on a GPU is short.
gpu-check: $(GPU_VENV)/.installed  ## check and measure this machine's GPU, then run tests/gpu; see docs/gpu.md
	$(GPU_VENV)/bin/python benchmarks/gpu_bundles.py $(CARRY)
	@PATH=$(abspath $(GPU_VENV))/bin:$$PATH; failed=0; sopdeploy env; \
	python benchmarks/gpu_server.py $(CARRY)/resnet50-fp16/latest --out $(CARRY)/server.jsonl $(OPTIONS) || failed=1; \
	for bundle in $(CARRY)/*/latest; do \
		sopdeploy verify $$bundle --set runtime=onnxruntime-cuda || failed=1; \
		SOPDEPLOY_RUNTIME=onnxruntime-cuda sopdeploy bench $$bundle --batch 1,8,32,64 || failed=1; \
	done; \
	for bundle in $(CARRY)/*/latest; do \
		sopdeploy engine $$bundle --profiles 1,8,64 || { failed=1; continue; }; \
		SOPDEPLOY_RUNTIME=tensorrt sopdeploy bench $$bundle --batch 1,8,32,64 || failed=1; \
	done; \
	python -m pytest -q tests/gpu && exit $$failed

soak: $(STAMP)  ## five minutes of valid, invalid, slow and disconnecting clients and model swaps; fails on a leak or a 5xx
	$(BIN)/python benchmarks/soak.py $(SOAK)

# From an archive: an sdist of the checkout would have its photos and keys, too.
dist: $(STAMP)  ## sdists and wheels of the commit in dist/, reproducible
	rm -rf build/source && mkdir -p build/source
	git archive --output build/source.tar HEAD && tar -xf build/source.tar -C build/source
	$(BUILD) --out-dir dist build/source
	$(BUILD) --out-dir dist build/source/plugins/papers

# One environment with changing extras: torch is installed and compiled once. Two lack a runtime, two lack torch, and
# only the first has the papers.
wheel-test: $(STAMP)  ## build the wheels, install them with changing extras, train with [train], run every command with each
	rm -rf build/wheel
	nice $(BUILD) --wheel --out-dir build/wheel
	nice $(BUILD) --wheel --out-dir build/wheel plugins/papers
	$(BIN)/uv venv --quiet --python $(BIN)/python build/wheel/.venv
	cd build/wheel && $(INSTALL_ALONE)[train,cpu]" sopdeploy_papers-*.whl
	cd build/wheel && $(ALONE)/sopdeploy reproduce dsop-9a --dry-run
	cd build/wheel && $(ALONE)/sopdeploy train --recipe digits-dsop --set epochs=1 --out run
	cd build/wheel && $(ALONE)/sopdeploy export run/best.pt --detach --max-batch 1 --out bundles
	cd build/wheel && $(INSTALL_ALONE)[train]" && $(EVERY_COMMAND)
	cd build/wheel && $(INSTALL_ALONE)" && $(EVERY_COMMAND)
	cd build/wheel && $(INSTALL_ALONE)[cpu]" && $(EVERY_COMMAND)
	cd build/wheel && $(ALONE)/python ../../deploy/no_torch.py && $(ALONE)/sopdeploy verify bundles/latest

samples-test: $(STAMP)  ## run the programs of the README and of deploy/samples; needs g++ with headers, javac, go, node, and `npm ci` there
	$(BIN)/pytest --nightly --no-skips tests/deploy/test_samples.py

alerts-test: $(STAMP)  ## check and test the alert rules and the queries of the dashboard; needs promtool (Debian: prometheus)
	$(BIN)/pytest --no-skips tests/deploy/test_deploy.py -k "alert_rules or dashboard"

extras-test: $(STAMP)  ## resolve the wheel from a folder with every extra, Python and platform; needs a package index
	$(BIN)/pytest --nightly --no-skips tests/deploy/test_workflows.py -k extra

install-test: $(STAMP)  ## install the wheel with each extra, with pip and uv, on the Pythons that exist, and run `pip check`; slow
	$(BIN)/pytest --nightly tests/deploy/test_workflows.py -k installs_with

container-test:  ## build the image with Docker, or buildah and debootstrap, then run and inspect it; TARGET=cpu or gpu
	$(MAKE) --jobs=2 $(STAMP) container-base
	$(BIN)/python deploy/container_test.py $(TARGET)

container-base:
	$(PYTHON) deploy/builders.py

audit: $(STAMP)  ## check deploy/lock/ for known vulnerabilities; fails if an entry was not audited
	$(BIN)/python deploy/audit.py $(OPTIONS)

# BASE_IMAGE=NAME@sha256:DIGEST adds the base image.
sbom: $(STAMP)  ## software bill of materials of the images (CycloneDX): dist/sbom-cpu.json and dist/sbom-gpu.json
	mkdir -p dist build
	sed "s/^dynamic = .*/version = \"$$($(BIN)/sopdeploy --version | cut -d ' ' -f 2)\"/" pyproject.toml > build/pyproject.toml
	for lock in cpu gpu; do \
		$(BIN)/uv tool run --from cyclonedx-bom cyclonedx-py requirements --output-reproducible \
			--spec-version 1.6 --pyproject build/pyproject.toml --output-file dist/sbom-$$lock.json deploy/lock/$$lock.txt || exit 1; \
	done
	$(if $(BASE_IMAGE),$(BIN)/python deploy/base_image.py '$(BASE_IMAGE)' dist/sbom-cpu.json dist/sbom-gpu.json)

release: $(STAMP)  ## make release VERSION=1.2.3 [OPTIONS="--dry-run --verbose"]: commit and tag; see CONTRIBUTING.md
	$(BIN)/uv tool run bump-my-version bump --new-version $(or $(VERSION),$(error release: add VERSION=1.2.3)) $(OPTIONS)

# `make lock OPTIONS='--constraint FILE'` keeps versions.
lock: $(STAMP)  ## rewrite deploy/lock/: the newest compatible versions, for images with the hashes of their files
	$(HASHED) pyproject.toml --extra cpu --extra sign --output-file deploy/lock/cpu.txt
	$(HASHED) pyproject.toml --extra gpu --extra sign --output-file deploy/lock/gpu.txt
	$(HASHED) --group build --output-file deploy/lock/build.txt
	$(COMPILE) pyproject.toml $(addprefix --extra ,$(EXTRAS)) --group build --group tools --output-file deploy/lock/dev.txt
	$(COMPILE) --group cuda-stand-in --no-deps --constraint deploy/lock/gpu.txt --output-file deploy/lock/cuda-stand-in.txt
	! command -v npm || npm install --package-lock-only --omit-lockfile-registry-resolved --prefix deploy/samples/javascript

$(STAMP): pyproject.toml plugins/papers/pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python deploy/install.py $(if $(LOCK),,--upgrade) --editable '$(INSTALLED)' --editable plugins/papers
	$(if $(LOWEST),$(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable > $(VENV)/lowest.txt)
	touch $@

clean:  ## remove everything that the targets above create
	rm -rf .venv .venv-newest .venv-lowest .venv-3.* $(GPU_VENV) .container demo dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
