VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: install demo test quality style train-mini

# Which mini model `make train-mini` trains: pq, vq or kl.
MINI ?= pq
MINI_STEPS ?= 4500

# Installs once; setup.py is the only thing that makes it stale.
$(VENV)/installed: setup.py src/diffusers_pq/_versions.py
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/python benchmarks/reconstruct_photographs.py --output_dir outputs/demo --models PQ=model_cards/pqgan-mini-f8-pq

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

# The recipe of the shipped mini model, for a 2-core CPU; VGG weights are not needed. The second stage, on larger crops,
# is what makes the group normalisation fit whole pictures: without it colours shift.
MINI_FLAGS = --train_data_dir data/debian --random_flip --mixed_precision bf16 --channels_last --max_grad_norm 1 \
	--lr_scheduler cosine --adam_beta1 0.9 --adam_beta2 0.99 --perceptual_weight 0 --discriminator_weight 0 --seed 0 \
	--checkpoints_total_limit 1 --resume_from_checkpoint latest

train-mini: install data/debian
	$(BIN)/accelerate launch --num_processes 1 --cpu training_scripts/train_pqgan.py $(MINI_FLAGS) \
		--model_config_name_or_path model_cards/pqgan-mini-f8-$(MINI)/config.json \
		--output_dir runs/pqgan-mini-f8-$(MINI)-64 --resolution 64 --train_batch_size 16 --crops_per_image 4 \
		--weight_init orthogonal --quantize_from_step 200 --codebook_init kmeans \
		--learning_rate 2e-3 --lr_warmup_steps 100 --max_train_steps $(MINI_STEPS) \
		--checkpointing_steps 250 --validation_steps 250
	$(BIN)/accelerate launch --num_processes 1 --cpu training_scripts/train_pqgan.py $(MINI_FLAGS) \
		--pretrained_model_name_or_path runs/pqgan-mini-f8-$(MINI)-64 \
		--output_dir runs/pqgan-mini-f8-$(MINI) --resolution 192 --train_batch_size 4 --crops_per_image 2 \
		--learning_rate 5e-4 --lr_warmup_steps 20 --max_train_steps 500 \
		--checkpointing_steps 250 --validation_steps 100
