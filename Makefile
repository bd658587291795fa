VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: install demo test quality style train-mini train-pqsd-mini benchmarks

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
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests

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

data/stamps: | install
	$(BIN)/diffusers-pq prepare-data $@ --packages tuxpaint-stamps-default --pad-to-square --short-side 192

# A Stable Diffusion for stamps on KL latents, its adaptation to PQ latents, and the same from scratch for comparison.
TRAIN_PQSD = $(BIN)/accelerate launch --num_processes 1 --cpu training_scripts/train_pqsd.py \
	--config training_scripts/recipes/sd-mini.yaml
ADAPT_PQSD = $(TRAIN_PQSD) --pretrained_model_name_or_path runs/sd-mini --vae_name_or_path model_cards/pqgan-mini-f8-pq

runs/sd-mini-untrained: | install data/stamps
	$(BIN)/python training_scripts/create_stable_diffusion.py --train_data_dir data/stamps --output_dir $@ \
		--vae_name_or_path model_cards/pqgan-mini-f8-kl --config_dir training_scripts/recipes/sd-mini

train-pqsd-mini: install data/stamps runs/sd-mini-untrained
	$(TRAIN_PQSD) --pretrained_model_name_or_path runs/sd-mini-untrained --train_text_encoder --output_dir runs/sd-mini
	$(ADAPT_PQSD) --output_dir runs/pqsd-mini --stages "128:300:5e-4:conv 128:2700:5e-4:all"
	$(ADAPT_PQSD) --output_dir runs/pqsd-mini-random --unet_init random

# Nothing else should run beside them. On 2 cores the second takes about an hour, the others some ten minutes each.
benchmarks: install
	$(BIN)/pip install --quiet -e ".[benchmark]"
	$(BIN)/python benchmarks/quantizer_speed.py
	$(BIN)/python benchmarks/model_speed.py
	$(BIN)/python benchmarks/training_speed.py
	$(BIN)/python benchmarks/rate_distortion.py
	$(BIN)/python benchmarks/generation_speed.py
