# `make demo` and `make test` work from a bare checkout; both set up .venv when it is missing or out of date.
#   PYTHON       the interpreter .venv is made from (3.11 or newer)
#   TORCH_INDEX  an extra package index to take torch from, such as PyTorch's own for CPU-only builds
#   PIP_ARGS     anything else for pip
PYTHON ?= python3
TORCH_INDEX ?=
PIP_ARGS ?=
ONCE ?=
MODEL ?= demo
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/installed
PACKAGES := vblora serving deploy examples benchmarks
modules = $(subst /,.,$(basename $(sort $(wildcard $(1)/bench_*.py))))
run_all = for module in $(call modules,$(1)); do echo "== $$module"; $(BIN)/python -m $$module $(ARGS) || exit 1; done

.PHONY: demo test test-clients check format serve bench bench-peers sweep soak adapters evidence replay-image clean

demo: $(INSTALLED)
	$(BIN)/vblora-serve demo $(if $(ONCE),--once) $(ARGS)

# A process of tests for each of two cores.
test: export OMP_NUM_THREADS ?= 1
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Other people's clients from npm and PyPI, unchanged, against a server on the demo model (needs node 20 or newer).
test-clients: $(INSTALLED) .clients/installed tests/e2e/clients/node/node_modules/installed
	$(BIN)/python -m tests.e2e.clients.run $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(PACKAGES)
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
	$(BIN)/python -m pytest -q tests/unit/test_import_rules.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: $(INSTALLED)
	$(BIN)/vblora-serve run $(MODEL) $(ARGS)

bench: $(INSTALLED)
	@$(call run_all,benchmarks)

# The claims beside other engines; each has an environment of its own, made here (llama.cpp is compiled: some minutes).
bench-peers: $(INSTALLED) .peers/vllm/installed .peers/llama/installed
	@$(call run_all,benchmarks/peers)

# Throughput over batch sizes and numbers of adapters, ours and vLLM's: benchmarks/sweep.png and sweep.json.
sweep: $(INSTALLED) .peers/vllm/installed
	$(BIN)/python -m benchmarks.sweep $(ARGS)

# Ten minutes of mixed load: no error, flat memory, steady steps.
soak: $(INSTALLED)
	$(BIN)/python -m benchmarks.soak $(ARGS)

# Train the demo's adapters again, into runs/adapters, and compare their files with the shipped ones.
adapters: $(INSTALLED)
	examples/customers/train.sh

# The tables and the plot of the README: on text that no adapter was trained on.
evidence: $(INSTALLED)
	$(BIN)/python -m examples.customers.evidence --plot docs/images/training-losses.png $(ARGS)

# The Dockerfile's steps in a temporary folder, up to a served completion: needs no container engine.
replay-image: $(INSTALLED)
	$(BIN)/python -m deploy.replay_image

clean:
	rm -rf .venv .peers .clients tests/e2e/clients/node/node_modules build dist *.egg-info vblora/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard vblora/csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(PIP_ARGS) \
		-c constraints.txt -e '.[demo,train,dev]'
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

.clients/installed: tests/e2e/clients/requirements.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install $(PIP_ARGS) -r $<
	touch $@

tests/e2e/clients/node/node_modules/installed: tests/e2e/clients/node/package-lock.json
	npm ci --no-audit --no-fund --prefix tests/e2e/clients/node
	touch $@

.peers/%/installed: export CMAKE_ARGS = -DGGML_NATIVE=ON
.peers/%/installed: benchmarks/peers/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(PIP_ARGS) -r $<
	$(@D)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	touch $@
