VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: install demo test quality style train-mini benchmarks

# Which mini model `make train-mini` trains: pq, vq or kl.
MINI ?= pq

# Installs once, and again when the requirements change.
$(VENV)/installed: setup.py src/diffusers_pq/_versions.py
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/python benchmarks/reconstruct_photographs.py --output_dir outputs/demo \
		--models PQ=model_cards/pqgan-mini-f8-pq VQ=model_cards/pqgan-mini-f8-vq KL=model_cards/pqgan-mini-f8-kl

test: install
	$(BIN)/python -m pytest tests

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

data/debian-tiles: | install
	$(BIN)/diffusers-pq prepare-data $@ --tile-size 256 --short-side 768

train-mini: install data/debian-tiles
	$(BIN)/accelerate launch --num_processes 1 --cpu training_scripts/train_pqgan.py \
		--config training_scripts/recipes/pqgan-mini.yaml \
		--model_config_name_or_path model_cards/pqgan-mini-f8-$(MINI)/config.json --output_dir runs/pqgan-mini-f8-$(MINI)

# Nothing else should run beside them. The first takes some ten minutes on 2 cores, the second about an hour.
benchmarks: install
	$(BIN)/pip install --quiet -e ".[benchmark]"
	$(BIN)/python benchmarks/quantizer_speed.py
	$(BIN)/python benchmarks/model_speed.py
