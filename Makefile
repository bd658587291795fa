VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: install demo test fuzz torture test-install quality style cards docs space test-space train-mini train-pqsd-mini train-ldm-mini train-masked-mini evaluate-minis head-start sweep-mini compare-mini benchmarks gpu-check gpu-sweep gpu-train

# Which mini model `make train-mini` trains, and `make train-ldm-mini` trains on: pq, vq or kl.
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
	$(BIN)/python benchmarks/overview.py --output outputs/demo/overview.jpg

test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder tests

# Thousands of damaged pictures, compressed files, models and checkpoints; `make test` takes a few hundred.
FUZZ_COUNT ?= 3000
FUZZ_SEED ?= $(shell date +%s)
fuzz: install
	FUZZ_COUNT=$(FUZZ_COUNT) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest tests/test_fuzz.py

# A training that is killed at twenty random moments ends with the weights of one that was not.
torture: install
	TORTURE_SEED=$(FUZZ_SEED) $(BIN)/python -m pytest -m torture tests/training/test_training.py

# The wheel in an empty environment.
test-install: install
	$(BIN)/python -m pytest -m install tests/test_package.py

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Renders the README.md of each folder in model_cards/ from cards.yaml, recipes and measured results.
cards: install
	$(BIN)/python -m diffusers_pq.hub.cards model_cards

# The site, in site/; a warning is an error. `mkdocs serve` shows it while writing.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The Hugging Face Space, with the included models. Its Gradio brings a Pillow below 13 into the environment.
space: install
	$(BIN)/pip install --quiet -e ".[space]"
	$(BIN)/python spaces/pqgan/app.py

# In headless Chromium; `make test` leaves it out where Gradio is not installed.
test-space: install
	$(BIN)/pip install --quiet -e ".[space]"
	$(BIN)/python -m pytest tests/test_space.py

data/debian-tiles: | install
	$(BIN)/diffusers-pq prepare-data $@ --tile-size 256 --short-side 768

# For final tables only; nothing may be tuned on them.
data/test-photographs: | install
	$(BIN)/diffusers-pq prepare-test-set $@

# Final scores of the included models; again whenever their weights change. FD and the like need thousands of pictures.
EVALUATIONS = benchmarks/results/evaluation
evaluate-minis: install data/test-photographs
	rm -rf $(EVALUATIONS)/*/test-photographs-test-512
	for kind in pq vq kl; do \
		$(BIN)/accelerate launch --num_processes 1 --cpu training_scripts/evaluate_reconstruction.py \
			--pretrained_model_name_or_path model_cards/pqgan-mini-f8-$$kind --data_dir data/test-photographs --split test \
			--resolution 512 --metrics psnr psnr_pooled ssim --batch_size 4 --output_dir $(EVALUATIONS) || exit 1; \
	done
	$(BIN)/python experiments/update_pages.py
	$(BIN)/python -m diffusers_pq.hub.cards model_cards

train-mini: install data/debian-tiles
	$(BIN)/accelerate launch --num_processes 1 --cpu training_scripts/train_pqgan.py \
		--config training_scripts/recipes/pqgan-mini.yaml \
		--model_config_name_or_path model_cards/pqgan-mini-f8-$(MINI)/config.json --output_dir runs/pqgan-mini-f8-$(MINI)

# How the codebooks of `make sweep-mini` start: normal, as in the paper, or kmeans.
START ?= normal
# Each is a run of the sweep and of the comparison; tables give mean and spread.
SEEDS ?= 0 1 2
SWEEP = OMP_NUM_THREADS=1 $(BIN)/python experiments/sweep_pqgan.py \
	--config training_scripts/recipes/pqgan-mini-sweep.yaml --codebook_init $(START) \
	--latent_channels 8 16 32 64 --codebook_size 128 512 --evaluation "--resolution 128 --dataloader_num_workers 0"

# Two workers, some half an hour a seed on 2 cores.
sweep-mini: install data/debian-tiles
	for seed in $(SEEDS); do \
		$(SWEEP) --seed $$seed --output_dir runs/sweep_$(START)-seed$$seed & other=$$!; \
		$(SWEEP) --seed $$seed --output_dir runs/sweep_$(START)-seed$$seed; status=$$?; \
		wait $$other && [ $$status = 0 ] || exit 1; \
	done
	$(BIN)/python experiments/sweep_figures.py $(SEEDS:%=runs/sweep_$(START)-seed%)
	$(BIN)/python experiments/update_pages.py

# The bottlenecks of Table 1 on one backbone, in two processes; some three hours on 2 cores.
COMPARE = OMP_NUM_THREADS=1 $(BIN)/python experiments/quantizer_comparison.py --seeds $(SEEDS) \
	--test_dir data/test-photographs
compare-mini: install data/debian-tiles data/test-photographs
	$(COMPARE) --bottlenecks vq multi_channel residual scalar & other=$$!; \
	$(COMPARE) --bottlenecks fsq kl none pq; status=$$?; wait $$other && exit $$status
	$(BIN)/python experiments/update_pages.py

data/emoji: | install
	$(BIN)/diffusers-pq prepare-data $@ --source emoji

data/emoji-128: | install
	$(BIN)/diffusers-pq prepare-data $@ --source emoji --short-side 128

data/stamps: | install
	$(BIN)/diffusers-pq prepare-data $@ --packages tuxpaint-stamps-default --pad-to-square --short-side 192

data/stamps-codes: | install data/stamps
	$(BIN)/accelerate launch --num_processes 1 --cpu training_scripts/encode_dataset.py --train_data_dir data/stamps \
		--vae_name_or_path model_cards/pqgan-mini-f8-pq --resolution 64 --min_image_side 1 --output_dir $@

# A Stable Diffusion for stamps on KL latents; its adaptation to PQ latents from each start of the new weights, and the
# same UNet from scratch.
TRAIN_PQSD = $(BIN)/accelerate launch --num_processes 1 --cpu training_scripts/train_pqsd.py \
	--config training_scripts/recipes/sd-mini.yaml
ADAPT_PQSD = $(TRAIN_PQSD) --pretrained_model_name_or_path runs/sd-mini --latents_dir data/stamps-codes \
	--vae_name_or_path model_cards/pqgan-mini-f8-pq --lr_scheduler constant_with_warmup --channel_weighting 1 \
	--noise_shift auto --rescale_betas_zero_snr --guidance_scale 2.5
TWO_STAGES = --stages "64:200:5e-4:conv 64:7300:5e-4:all 64:10500:1e-4:all"

runs/sd-mini-untrained: | install data/stamps
	$(BIN)/python training_scripts/create_stable_diffusion.py --train_data_dir data/stamps --output_dir $@ \
		--vae_name_or_path model_cards/pqgan-mini-f8-kl --config_dir training_scripts/recipes/sd-mini

train-pqsd-mini: install data/stamps data/stamps-codes runs/sd-mini-untrained
	$(TRAIN_PQSD) --pretrained_model_name_or_path runs/sd-mini-untrained --train_text_encoder --output_dir runs/sd-mini
	$(ADAPT_PQSD) --output_dir runs/pqsd-mini $(TWO_STAGES)
	$(ADAPT_PQSD) --output_dir runs/pqsd-mini-random --unet_init random \
		--stages "64:7500:5e-4:all 64:10500:1e-4:all"
	$(ADAPT_PQSD) --output_dir runs/pqsd-mini-copy_scaled --unet_init copy_scaled $(TWO_STAGES) --max_train_steps 800
	$(ADAPT_PQSD) --output_dir runs/pqsd-mini-zero --unet_init zero $(TWO_STAGES) --max_train_steps 800
	$(BIN)/python experiments/adaptation.py --runs copy=runs/pqsd-mini copy_scaled=runs/pqsd-mini-copy_scaled \
		zero=runs/pqsd-mini-zero random=runs/pqsd-mini-random

# The same for emoji, in brief: how far ahead of a new UNet the adapted one is, from each start and with several seeds.
# A CPU with instructions for bfloat16 (avx512_bf16, amx_bf16) is about twice as fast with it; on others, PRECISION=no.
PRECISION ?= bf16
data/emoji-codes: | install data/emoji-128
	$(BIN)/accelerate launch --num_processes 1 --cpu --mixed_precision $(PRECISION) training_scripts/encode_dataset.py \
		--train_data_dir data/emoji-128 --vae_name_or_path model_cards/pqgan-mini-f8-pq --resolution 64 --min_image_side 1 \
		--output_dir $@

runs/sd-emoji-untrained: | install data/emoji-128
	$(BIN)/python training_scripts/create_stable_diffusion.py --train_data_dir data/emoji-128 --output_dir $@ \
		--vae_name_or_path model_cards/pqgan-mini-f8-kl --config_dir training_scripts/recipes/sd-emoji --vocab_size 3000 \
		--prediction_type sample

head-start: install data/emoji-128 data/emoji-codes runs/sd-emoji-untrained
	$(BIN)/accelerate launch --num_processes 1 --cpu --mixed_precision $(PRECISION) training_scripts/train_pqsd.py \
		--config training_scripts/recipes/sd-emoji.yaml --pretrained_model_name_or_path runs/sd-emoji-untrained \
		--train_text_encoder --output_dir runs/sd-emoji
	ACCELERATE_MIXED_PRECISION=$(PRECISION) $(BIN)/python experiments/head_start.py --source runs/sd-emoji \
		--vae model_cards/pqgan-mini-f8-pq --data_dir data/emoji-128 --latents_dir data/emoji-codes

# Table 5 in small: class-conditional latent diffusion of stamps on the latents of a mini model.
train-ldm-mini: install data/stamps
	$(BIN)/accelerate launch --num_processes 1 --cpu training_scripts/train_ldm.py \
		--config training_scripts/recipes/ldm-mini.yaml --vae_name_or_path model_cards/pqgan-mini-f8-$(MINI) \
		--output_dir runs/ldm-mini-$(MINI)

# Generation from the codes in small: emoji by their group.
train-masked-mini: install data/emoji
	$(BIN)/accelerate launch --num_processes 1 --cpu training_scripts/train_masked.py \
		--config training_scripts/recipes/masked-mini.yaml

# Nothing else should run beside them. On 2 cores the second takes about an hour, the others some ten minutes each.
benchmarks: install data/debian-tiles
	$(BIN)/pip install --quiet -e ".[benchmark]"
	$(BIN)/python benchmarks/quantizer_speed.py
	$(BIN)/python benchmarks/model_speed.py
	$(BIN)/python experiments/training_speed.py
	$(BIN)/python experiments/rate_distortion.py
	$(BIN)/python benchmarks/generation_speed.py

# On a GPU. With BARE=1 on a machine that holds torch but reaches no registry: what `python -m benchmarks.gpu_bundle` has
# packed is installed beside its packages, and its pictures are taken.
ifdef BARE
GPU_PYTHON = PYTHONPATH=$(CURDIR)/build/site-packages$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)
GPU_READY = build/site-packages build/deepspeed
SWEEP_DATA ?= build/data
TRAIN_DATA ?= build/data
else
GPU_PYTHON = $(BIN)/python
GPU_READY = install
SWEEP_DATA ?= data/debian-tiles
TRAIN_DATA ?= data/emoji
endif
# Where results go, by default to a folder of the device.
RESULTS ?=
GPU_OUTPUT = $(if $(RESULTS),--output_dir $(RESULTS))

DEEPSPEED = $(wildcard .whl/deepspeed-*.whl)
WHEELS = $(filter-out $(DEEPSPEED),$(wildcard .whl/*.whl))
INSTALL_BARE = $(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation --no-compile --upgrade --target
# The name tells dill, by which datasets compares functions, that these modules are installed.
build/site-packages: $(WHEELS) $(shell find src pipelines -name "*.py")
	$(INSTALL_BARE) $@ $(WHEELS) .
	touch $@

# On its own, for its test: accelerate imports it in every training that could see it.
build/deepspeed: $(DEEPSPEED)
	mkdir -p $@
	$(if $<,$(INSTALL_BARE) $@ $<)
	touch $@

build/data: .whl/data.tar.gz
	mkdir -p $@
	tar -xf $< -C $@

# Right first, then fast; some six minutes on one card.
gpu-check: $(GPU_READY)
	$(GPU_PYTHON) benchmarks/gpu_check.py $(GPU_OUTPUT)

# Vector quantisation at growing d, from several starts; some six minutes.
gpu-sweep: $(GPU_READY) $(SWEEP_DATA)
	$(GPU_PYTHON) experiments/gpu_sweep.py --data_dir $(SWEEP_DATA) $(GPU_OUTPUT)

# Autoencoders, a source and its adaptation to PQ latents; some twelve minutes.
gpu-train: $(GPU_READY) $(TRAIN_DATA)
	$(GPU_PYTHON) experiments/gpu_train.py --data_dir $(TRAIN_DATA) $(GPU_OUTPUT)
