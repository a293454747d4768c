PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := out
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all test-lowest test-newest check format clean
.PHONY: gpu-pack gpu

# The main job on the repository's real films: export, predict, bench.
demo: $(VENV)/export
	$(BIN)/cxrgaze-export --precision fp16 --output $(OUT)
	$(BIN)/cxrgaze-predict $(OUT)/demo-fp16.cxrgaze examples/films --output $(OUT)/readings --heatmap npy
	$(BIN)/cxrgaze-bench run $(OUT)/demo-fp16.cxrgaze --films examples/films --output $(OUT)/bench || \
	  test $$? -eq 9 # a machine too busy to settle, which the report says
	@echo
	@echo "bundle     $(OUT)/demo-fp16.cxrgaze"
	@echo "readings   $(OUT)/readings (readings.csv, a JSON, an overlay PNG and a heatmap per film)"
	@echo "report     $(OUT)/bench/report.html"

# One thread a process: two that spin for two cores take longer than one.
test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not long" -n auto --dist worksteal --durations=20

# With what is long or slow: the paper network, the whole demo training run.
test-all: $(VENV)/dev
	$(BIN)/python -m pytest

# A device's install in an environment of its own, at the lowest versions that pyproject.toml
# declares (on Python 3.10 where there is one) and at the newest. Needs a package index.
test-lowest test-newest: test-%: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/test_bounds.py -k $* -rP

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(OUT) build dist src/*.egg-info

$(VENV)/export $(VENV)/dev: $(VENV)/%: pyproject.toml constraints.txt
	@echo "making $(VENV) with the $* extra (once; some minutes)"
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e ".[$*]"
	touch $@

# What a machine with a card needs, made here without one: docs/benchmarks.md.
gpu-pack: $(VENV)/export
	$(BIN)/python -m cxrgaze.benchmarks.gpu_pack $(OUT)/gpu-pack

# The pack, where the card is. Without $(VENV) it is $(PYTHON), and from the pack what that lacks.
# SITE: a folder of packages to come first (an ONNX Runtime for a card, a TensorRT).
gpu:
	test -x $(BIN)/python || $(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile \
	  --upgrade --target $(OUT)/gpu-site $(OUT)/gpu-pack/wheels/*.whl
	PYTHONPATH=$(CURDIR)/src:$(SITE):$(CURDIR)/$(OUT)/gpu-site \
	  $$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) \
	  -m cxrgaze.benchmarks.gpu_run $(OUT)/gpu-pack --output $(or $(TO),$(OUT)/gpu)
