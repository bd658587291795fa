"""
What an earlier version wrote is read as before.

`fixtures/earlier_version` was written by the version before `image_mean`: a run of `train_pqgan.py` of two steps, with
its model as it was pushed and its checkpoint; the norms of the weights that the same version had after a third step; a
compressed picture, and what it was decompressed to; and a recipe.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from safetensors.torch import load_file
from scripts import run_script

from diffusers_pq import PQModel
from diffusers_pq.autoencoders import load_autoencoder
from diffusers_pq.cli import main
from diffusers_pq.flags import parse
from diffusers_pq.training.stable_diffusion import AdaptationOptions


ROOT = Path(__file__).parents[1]
WRITTEN = Path(__file__).parent / "fixtures" / "earlier_version"
RUN = WRITTEN / "run"


def test_a_pushed_model_loads_with_the_defaults_of_options_that_it_lacks():
    assert "image_mean" not in json.loads((RUN / "config.json").read_text())
    for model in (load_autoencoder(str(RUN)), PQModel.from_pretrained(RUN)):
        assert isinstance(model, PQModel) and model.config.image_mean is None
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
            name: tensor.shape for name, tensor in load_file(RUN / "diffusion_pytorch_model.safetensors").items()
        }


def test_a_compressed_picture_is_decompressed_to_the_same(tmp_path):
    output = tmp_path / "picture.png"
    assert main(["decompress", str(WRITTEN / "picture.pqc"), "--model", str(RUN), "--output", str(output)]) == 0
    pair = [np.asarray(PIL.Image.open(path)).astype(int) for path in (output, WRITTEN / "picture.png")]
    assert pair[0].shape == pair[1].shape and np.abs(pair[0] - pair[1]).max() <= 1  # rounding differs with the CPU


def test_a_run_goes_on_from_its_checkpoint_to_the_same_weights(tmp_path):
    shutil.copytree(RUN, tmp_path / "run")
    for split, count in (("train", 6), ("validation", 2)):
        for number in range(count):
            _ramp(tmp_path / "data" / split / f"{number}.png", 40 * number)
    run_script(
        *(ROOT / "training_scripts" / "train_pqgan.py", "--model_config_name_or_path", RUN),
        *("--train_data_dir", tmp_path / "data", "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run"),
        *("--resolution", 16, "--train_batch_size", 2, "--learning_rate", 1e-3, "--codebook_init", "kmeans"),
        *("--use_ema", "--ema_decay", 0.5, "--perceptual_weight", 0, "--discriminator_weight", 0),
        *("--report_to", "none", "--max_train_steps", 3, "--resume_from_checkpoint", "latest"),
    )
    weights = load_file(tmp_path / "run" / "diffusion_pytorch_model.safetensors")
    norms = {name: weight.double().norm().item() for name, weight in weights.items()}
    assert norms == pytest.approx(json.loads((WRITTEN / "step-3.json").read_text()), rel=1e-5)


def _ramp(path: Path, blue: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    green, red = np.meshgrid(np.linspace(0, 255, 24), np.linspace(0, 255, 20))
    pixels = np.stack([red, green, np.full_like(red, blue)], axis=-1)
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(path)


def test_a_recipe_with_stages_in_one_line_is_read():
    args = parse(AdaptationOptions, ["--config", str(WRITTEN / "pqsd-quick.yaml")])
    stages = [(stage.resolution, stage.steps, stage.learning_rate, stage.trained) for stage in args.stages]
    assert stages == [(384, 20_000, 8e-5, "conv"), (768, 800_000, 8e-5, "all"), (768, 200_000, 2e-5, "all")]
    assert args.use_ema and args.train_batch_size == 8 and args.max_train_steps == 1_020_000
