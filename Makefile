# Everything runs in a virtual environment of its own; `make demo` and `make test` set it up when it is missing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-long test-deepspeed test-gpu lint clean

demo: $(VENV)/.installed
	$(BIN)/accelerate launch --config_file accelerate_configs/single.yaml recipes/sft_then_dpo.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What takes minutes each: many kills, thousands of rows, whole recipes in two processes, benchmarks.
test-long: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m long -n 2 --dist loadfile

test-deepspeed: $(VENV)/.installed-deepspeed
	PYTHONPATH=$(abspath $(VENV)/deepspeed) $(BIN)/python -m pytest -m deepspeed tests/zero

# Every setting on one GPU, meant to take less than 5 minutes on an H100. Without CUDA all of it is skipped, and pytest
# says why. Most of the bodies run on a CPU in `make test`.
test-gpu: $(VENV)/.installed-deepspeed
	HFT_TEST_GPU=1 $(BIN)/python -m pytest -m gpu tests/gpu
	HFT_TEST_GPU=1 PYTHONPATH=$(abspath $(VENV)/deepspeed) $(BIN)/python -m pytest -m gpu tests/zero

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs build *.egg-info

# torch comes first and pinned, so that a CPU machine can take a CPU wheel instead of gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) -e ".[test]"
	touch $@

# In a folder of its own, since accelerate imports an installed DeepSpeed in every process, whether it is used or not.
# Nothing is compiled.
$(VENV)/.installed-deepspeed: $(VENV)/.installed-test
	rm -rf $(VENV)/deepspeed
	DS_BUILD_OPS=0 $(INSTALL) --no-deps --target $(VENV)/deepspeed deepspeed hjson py-cpuinfo msgpack einops ninja
	touch $@
