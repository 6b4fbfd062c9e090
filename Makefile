# The commands of this project. `make demo` and `make test` need Python 3.11 to 3.13 and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOAK ?= --seconds 300
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --upgrade \
	--no-header --no-annotate --no-emit-index-url --no-emit-find-links

export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test check format lint types contracts tests test-models goldens docs site gpu-check soak wheel-test wheel-test-train container-test lock clean

demo: $(STAMP)  ## the main job, from handwritten digits to answers over HTTP
	$(BIN)/sopdeploy demo

test: $(STAMP) check tests  ## everything that CI runs

check: lint types contracts  ## format, lint, types, import contracts

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

tests: $(STAMP)
	$(BIN)/pytest -n auto --dist worksteal

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

wheel-test: $(STAMP)  ## build the wheel, install it with [cpu] into an empty environment, serve with it
	$(BIN)/python deploy/wheel_test.py cpu

wheel-test-train: $(STAMP)  ## the same, and train with the wheel's [train] (gigabytes of torch)
	$(BIN)/python deploy/wheel_test.py cpu train

container-test: $(STAMP)  ## build the image with Docker, or buildah and debootstrap, run it and look at it
	$(BIN)/python deploy/container_test.py

lock: $(STAMP)  ## write deploy/lock/ again: the newest versions that fit, with the hashes of their files
	$(COMPILE) pyproject.toml --extra cpu --extra sign --extra oci --output-file deploy/lock/cpu.txt
	$(COMPILE) pyproject.toml --extra gpu --extra sign --extra oci --output-file deploy/lock/gpu.txt
	echo 'hatchling>=1.27' | $(COMPILE) - --output-file deploy/lock/build.txt

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[cpu,train,import,otel,sign,s3,oci,ray,docs,dev]'
	touch $(STAMP)

clean:  ## remove what the targets above made
	rm -rf $(VENV) .container demo dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
