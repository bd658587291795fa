VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: install demo test quality style train-mini

# Which mini model `make train-mini` trains: pq, vq or kl.
MINI ?= pq

# Installs once; setup.py is the only thing that makes it stale.
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

data/debian: | install
	$(BIN)/diffusers-pq prepare-data $@

data/debian-tiles: | install
	$(BIN)/diffusers-pq prepare-data $@ --tile-size 256 --short-side 768

TRAIN = $(BIN)/accelerate launch --num_processes 1 --cpu training_scripts/train_pqgan.py

# k-means keeps vector quantisation from collapsing to a few codes; PQ takes the codebooks of the backbone's stages.
MINI_FLAGS_vq = --codebook_init kmeans

train-mini: install data/debian data/debian-tiles
	$(TRAIN) --config training_scripts/recipes/pqgan-mini-64.yaml
	$(TRAIN) --config training_scripts/recipes/pqgan-mini-192.yaml
	$(TRAIN) --config training_scripts/recipes/pqgan-mini.yaml $(MINI_FLAGS_$(MINI)) \
		--model_config_name_or_path model_cards/pqgan-mini-f8-$(MINI)/config.json --output_dir runs/pqgan-mini-f8-$(MINI)
