"""Training in two processes on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from scripts import run_script

from diffusers_pq import PQModel
from diffusers_pq.data.pictures import Crops, PictureSource, usable_rows
from diffusers_pq.training.codebooks import EMACodebooks
from diffusers_pq.training.pqgan import AutoencoderLoss, LossWeights, ReconstructionModel, ReconstructionValidation


def learn(accelerator):
    """The gradients of the loss on this process's share of four pictures, and the codebooks after a step of means."""
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    share = images.chunk(accelerator.num_processes)[accelerator.process_index]
    torch.manual_seed(0)
    model = accelerator.prepare(ReconstructionModel(PQModel(**tiny_config())).train())
    loss = AutoencoderLoss(LossWeights(perceptual=0, discriminator=0), None, None, accelerator)
    value, _ = loss.generator(model, share, model(share))
    accelerator.backward(value)
    bare = accelerator.unwrap_model(model)
    learned = {name: parameter.grad for name, parameter in bare.named_parameters()}
    quantizer = bare.autoencoder.quantizer
    remedy = EMACodebooks(quantizer, accelerator, decay=0.5)
    latents = bare.autoencoder.encode(share).latents
    remedy.observe(latents, quantizer(latents).codes)
    remedy.step()
    return learned | {"moved codebooks": quantizer.codebooks.detach()}


LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ROOT = Path(__file__).parents[2]


def launch(*command, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment
    command = [*LAUNCH, *map(str, command)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    print(result.stderr)
    result.check_returncode()


def test_two_processes_have_the_gradients_and_codebooks_of_one_with_twice_the_batch(tmp_path):
    output = tmp_path / "two.safetensors"
    launch(__file__, output, PYTHONPATH=str(Path(__file__).parents[1]))
    shared = load_file(output)
    assert shared.pop("processes") == 2
    alone = learn(Accelerator(cpu=True))
    assert alone.keys() == shared.keys()
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert all(value.any() for name, value in alone.items() if "codebooks" in name)


def test_two_processes_stream_validate_and_resume_exactly(tmp_path):
    for split, count in (("train", 14), ("validation", 5)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(count):
            picture = PIL.Image.effect_noise((40, 36), 40).convert("RGB")
            picture.save(tmp_path / "data" / split / f"{number}.png")
    PQModel(**tiny_config()).save_config(tmp_path / "pq")
    command = [ROOT / "training_scripts" / "train_pqgan.py", "--model_config_name_or_path", tmp_path / "pq"]
    command += ["--train_data_dir", tmp_path / "data", "--streaming", "--shuffle_buffer", 3, "--resolution", 32]
    command += ["--train_batch_size", 2, "--perceptual_weight", 0, "--learning_rate", 1e-3, "--max_train_steps", 6]
    command += ["--codebook_ema_decay", 0.9, "--reseed_dead_entries", 2, "--use_ema", "--checkpointing_steps", 3]
    command += ["--dataloader_num_workers", 1, "--validation_steps", 6]
    launch(*command, "--output_dir", tmp_path / "whole")
    launch(*command, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", tmp_path / "whole/checkpoint-3")
    folders = tmp_path / "whole", tmp_path / "resumed"
    whole, resumed = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in folders)
    assert [name for name, value in whole.items() if not torch.equal(resumed[name], value)] == []
    scores = [json.loads((folder / "best" / "validation.json").read_text()) for folder in folders]
    assert scores[0] == scores[1]
    # One process, and another batch size, give the same means: none of the five pictures was counted twice.
    rows = usable_rows(PictureSource(data_dir=str(tmp_path / "data")).load("validation"), "image", 64)
    validation = ReconstructionValidation(Accelerator(cpu=True), rows, Crops("image", 32, center_crop=True), 4)
    alone, _ = validation.evaluate(ReconstructionModel(PQModel.from_pretrained(tmp_path / "whole" / "best")))
    assert scores[0] == pytest.approx({"step": 6} | alone, rel=1e-4)


def test_a_run_of_one_process_goes_on_in_two_with_the_same_rates_and_weights(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    for number in range(8):
        picture = PIL.Image.effect_noise((32, 32), 40).convert("RGB")
        picture.save(tmp_path / "data" / "train" / f"{number}.png")
    PQModel(**tiny_config()).save_config(tmp_path / "pq")
    command = [ROOT / "training_scripts" / "train_pqgan.py", "--model_config_name_or_path", tmp_path / "pq"]
    command += ["--train_data_dir", tmp_path / "data", "--validation_share", 0, "--resolution", 32]
    command += ["--total_batch_size", 4, "--perceptual_weight", 0, "--discriminator_weight", 0, "--report_to", "none"]
    command += ["--lr_scheduler", "linear", "--lr_warmup_steps", 1, "--learning_rate", 1e-3, "--adam_beta2", 0.999]
    command += ["--checkpointing_steps", 2, "--max_train_steps", 5]
    run_script(*command, "--output_dir", tmp_path / "one")
    resume = "--resume_from_checkpoint", tmp_path / "one" / "checkpoint-2"
    launch(*command, "--output_dir", tmp_path / "two", *resume)
    checkpoints = [tmp_path / name / "checkpoint-4" for name in ("one", "two")]
    rates = [
        torch.load(folder / "optimizer.bin", weights_only=True)["param_groups"][0]["lr"] for folder in checkpoints
    ]
    assert rates[0] == rates[1] == pytest.approx(1e-3 / 4)
    folders = tmp_path / "one" / "checkpoint-2", *checkpoints
    start, one, two = (
        torch.cat([value.flatten() for value in load_file(folder / "model.safetensors").values()])
        for folder in folders
    )
    assert (two - one).norm() < 0.02 * (one - start).norm()


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    found = learn(accelerator)
    if accelerator.is_main_process:
        save_file(found | {"processes": torch.tensor(accelerator.num_processes)}, sys.argv[1])
    accelerator.end_training()
