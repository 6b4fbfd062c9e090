# Commands of this project. `make demo` and `make test` need Python 3.11 to 3.13 and a package index.
PYTHON ?= python3
OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOAK ?= --seconds 300
TARGET ?= cpu
WHEELS ?=
GPU_VENV := .venv-gpu
GPU_EXTRAS ?= gpu-check,tensorrt
GPU_INSTALL = $(GPU_VENV)/bin/python -m pip install --quiet $(if $(WHEELS),--no-index --find-links $(WHEELS))
# One worker more than cores: many tests wait for servers and processes.
WORKERS = $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)')
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links
# Unit tests that start no other process; `make quick` runs them.
UNIT := $(addprefix tests/sopdeploy/,layers backbones images data bundle evaluation doctor) \
	$(addprefix tests/service/,http images) tests/sweep/test_goldens.py

export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1
# uv does not compile to bytecode. Without a bytecode cache every process that a test starts compiles torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo quick test fuzz check lint types contracts unit tests ray-test test-models goldens format docs \
	pictures site gpu-check soak dist wheel-test container-test container-base audit sbom release lock clean

demo: $(STAMP)  ## train on digits, export with proof, serve, and classify over HTTP
	$(BIN)/sopdeploy demo

quick: $(STAMP)  ## format, lint, types, import contracts and unit tests, in under 90 seconds
	$(MAKE) --jobs=2 types lint contracts unit

# Ray mostly waits for its own processes, so single-core jobs run beside it; the tests then use all cores.
test: $(STAMP)  ## format, lint, types, import contracts, the wheel, all tests: what CI runs
	$(MAKE) --jobs=2 ray-test check wheel-test
	$(MAKE) tests
	@if git diff --quiet HEAD 2>/dev/null; then git rev-parse HEAD >$(VENV)/.tested; fi

fuzz: $(STAMP)  ## the property tests with new random examples; a failure prints how to reproduce it
	$(BIN)/pytest -n $(WORKERS) --hypothesis-profile=fuzz -m "hypothesis and not ray"

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
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not ray"

# A Ray cluster gives up when other processes delay its start, so this runs before the other tests. It collects
# all tests, which compiles them once; otherwise all test workers compile the same modules at the same time.
ray-test: $(STAMP)
	$(BIN)/pytest -m ray

test-models: $(STAMP)  ## the slow tests: every network at full width through training, export and parity (one hour)
	$(BIN)/pytest --slow -m slow

goldens: $(STAMP)  ## rewrite tests/goldens; review the diff
	$(BIN)/pytest --rewrite-goldens tests/sweep/test_goldens.py

format: $(STAMP)  ## format the code and apply ruff's automatic fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## rewrite the generated pages of docs/
	$(BIN)/python docs/generate.py

pictures: $(STAMP)  ## create the screenshots and the chart of the README; needs Chromium
	$(BIN)/python docs/generate_pictures.py

site: $(STAMP)  ## build docs/ as a site; open build/site/index.html
	$(BIN)/mkdocs build --strict --quiet

# In its own environment, which also sees the packages of $(PYTHON), such as torch: a GPU server may have no package index.
gpu-check:  ## check this machine's GPU, write docs/benchmarks/gpu.md; WHEELS=FOLDER takes all packages from a folder
	$(PYTHON) -m venv --system-site-packages $(GPU_VENV)
	$(GPU_INSTALL) hatchling editables
	$(GPU_INSTALL) --no-build-isolation --editable '.[$(GPU_EXTRAS)]'
	$(GPU_VENV)/bin/python -m pytest tests/gpu
	$(GPU_VENV)/bin/python benchmarks/gpu_check.py $(OPTIONS)

soak: $(STAMP)  ## five minutes of valid, invalid, slow and disconnecting clients and model swaps; fails on a leak or a 5xx
	$(BIN)/python benchmarks/soak.py $(SOAK)

dist: $(STAMP)  ## sdist and wheel in dist/, reproducible for the same commit
	$(BIN)/python deploy/distributions.py

wheel-test: $(STAMP)  ## build the wheel twice, install it into empty environments, train with [train], serve with [cpu]
	nice $(BIN)/python deploy/wheel_test.py

container-test:  ## build the image with Docker, or buildah and debootstrap, then run and inspect it; TARGET=cpu or gpu
	$(MAKE) --jobs=2 $(STAMP) container-base
	$(BIN)/python deploy/container_test.py $(TARGET)

container-base:
	$(PYTHON) deploy/builders.py

audit: $(STAMP)  ## check deploy/lock/ for known vulnerabilities; reports when the database is not reachable
	$(BIN)/python deploy/audit.py

sbom: $(STAMP)  ## software bill of materials of the images (CycloneDX): dist/sbom-cpu.json and dist/sbom-gpu.json
	$(BIN)/python deploy/sbom.py

release: $(STAMP)  ## make release VERSION=1.2.3 [OPTIONS=--dry-run]: docs/releasing.md
	$(BIN)/python deploy/release.py $(VERSION) $(OPTIONS)

lock: $(STAMP)  ## rewrite deploy/lock/: the newest compatible versions with the hashes of their files
	$(COMPILE) pyproject.toml --extra cpu --extra sign --extra oci --output-file deploy/lock/cpu.txt
	$(COMPILE) pyproject.toml --extra gpu --extra sign --extra oci --output-file deploy/lock/gpu.txt
	printf 'build>=1.2\nhatchling>=1.27\n' | $(COMPILE) - --output-file deploy/lock/build.txt
	$(BIN)/python deploy/licences.py

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python deploy/install.py --editable '.[cpu,train,import,otel,sign,s3,oci,ray,batch,docs,dev]'
	touch $(STAMP)

clean:  ## remove everything that the targets above create
	rm -rf $(VENV) $(GPU_VENV) .container demo dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
