# The commands of this project. `make demo` and `make test` need Python 3.11 to 3.13 and a package index.
PYTHON ?= python3
OPTIONS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOAK ?= --seconds 300
# One more than there are cores: a good part of the tests waits, for servers and clocks.
WORKERS = $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)')
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links

export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1
# uv compiles nothing: where bytecode may not be kept, every process that a test starts compiles torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check format lint types contracts tests ray-test compiled test-models goldens docs site gpu-check soak dist wheel-test \
	container-test container-base audit sbom release lock clean

demo: $(STAMP)  ## the main job, from handwritten digits to answers over HTTP
	$(BIN)/sopdeploy demo

# Ray mostly waits for its own processes, so what has one core only goes beside it; the tests take all cores.
test: $(STAMP)  ## format, lint, types, import contracts, the wheel, the tests: what CI runs
	$(MAKE) --jobs=2 ray-test check wheel-test compiled
	$(MAKE) tests
	@if git diff --quiet HEAD 2>/dev/null; then git rev-parse HEAD >$(VENV)/.tested; fi

check: lint types contracts  ## format, lint, types, import contracts

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	nice $(BIN)/mypy

contracts: $(STAMP)
	nice $(BIN)/lint-imports

tests: $(STAMP)
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m "not ray"

# On its own: a cluster gives up before it has started where other processes come first.
ray-test: $(STAMP)
	$(BIN)/pytest -m ray tests/service/server/on_ray

compiled: $(STAMP)  # once for all processes of `tests`, each of which would do it at the same moment
	nice $(BIN)/pytest --collect-only --quiet >/dev/null

test-models: $(STAMP)  ## every network of the catalog at full width through training, export and parity (an hour)
	$(BIN)/pytest --slow -m slow

goldens: $(STAMP)  ## write tests/goldens again; the diff says which numbers changed
	$(BIN)/pytest --rewrite-goldens tests/sweep/test_goldens.py

format: $(STAMP)  ## write the format and the fixes that ruff knows
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## write the generated pages again
	$(BIN)/python docs/generate.py

site: $(STAMP)  ## docs/ as a site in build/site; open build/site/index.html
	$(BIN)/mkdocs build --strict --quiet

gpu-check: $(STAMP)  ## build and run real engines on this machine's GPU, write docs/benchmarks/
	$(BIN)/python benchmarks/gpu_check.py
	$(BIN)/pytest tests/gpu

soak: $(STAMP)  ## five minutes of good, bad, slow and leaving clients and swaps; fails on a leak, a wrong answer or a 5xx
	$(BIN)/python benchmarks/soak.py $(SOAK)

dist: $(STAMP)  ## sdist and wheel in dist/, the same bytes for the same commit
	$(BIN)/python deploy/distributions.py

wheel-test: $(STAMP)  ## build the wheel twice, install it into empty environments, train with [train], serve with [cpu]
	nice $(BIN)/python deploy/wheel_test.py

container-test:  ## build the image with Docker, or buildah and debootstrap, run it and look at it
	$(MAKE) --jobs=2 $(STAMP) container-base
	$(BIN)/python deploy/container_test.py

container-base:
	$(PYTHON) deploy/builders.py

audit: $(STAMP)  ## is something in deploy/lock/ known to be vulnerable; says so where nobody can be asked
	$(BIN)/python deploy/audit.py

sbom: $(STAMP)  ## what the images hold, as CycloneDX: dist/sbom-cpu.json and dist/sbom-gpu.json
	$(BIN)/python deploy/sbom.py

release: $(STAMP)  ## make release VERSION=1.2.3 [OPTIONS=--dry-run]: docs/releasing.md
	$(BIN)/python deploy/release.py $(VERSION) $(OPTIONS)

lock: $(STAMP)  ## write deploy/lock/ again: the newest versions that fit, with the hashes of their files
	$(COMPILE) pyproject.toml --extra cpu --extra sign --extra oci --output-file deploy/lock/cpu.txt
	$(COMPILE) pyproject.toml --extra gpu --extra sign --extra oci --output-file deploy/lock/gpu.txt
	printf 'build>=1.2\nhatchling>=1.27\n' | $(COMPILE) - --output-file deploy/lock/build.txt
	$(BIN)/python deploy/licences.py

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python deploy/install.py --editable '.[cpu,train,import,otel,sign,s3,oci,ray,docs,dev]'
	touch $(STAMP)

clean:  ## remove what the targets above made
	rm -rf $(VENV) .container demo dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
