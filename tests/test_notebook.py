"""Runs the notebook of docs/your_own.md, in small and against a stand-in for the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
from conftest import tiny_config
from hub_stand_in import Hub

from diffusers_pq import PQModel, StableDiffusionPQPipeline
from diffusers_pq.autoencoders import load_autoencoder


ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "your_own.ipynb"
UNET = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4,
}
TEXT_ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_inputs(folder):
    """A folder of captioned photographs without a validation split, and configurations of small models."""
    (folder / "photographs").mkdir()
    generator, lines = np.random.default_rng(0), []
    for number in range(12):
        pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).resize((48, 36)).save(folder / "photographs" / f"{number}.jpg")
        lines.append(json.dumps({"file_name": f"{number}.jpg", "text": f"A {('red', 'blue')[number % 2]} wall."}))
    (folder / "photographs" / "metadata.jsonl").write_text("\n".join(lines))
    PQModel(**tiny_config()).save_config(folder / "pq")
    (folder / "configs").mkdir()
    (folder / "configs" / "unet.json").write_text(json.dumps(UNET))
    (folder / "configs" / "text_encoder.json").write_text(json.dumps(TEXT_ENCODER))
    (folder / "training_scripts").symlink_to(ROOT / "training_scripts")


def small_settings(folder):
    short = ["--min_image_side", 1, "--train_batch_size", 4, "--validation_steps", 1]
    return {
        "PICTURES": "photographs",
        "OUTPUT": "out",
        "RESOLUTION": 32,
        "MODEL_CONFIG": "pq",
        "PQGAN_FLAGS": [*short, "--max_train_steps", 2, "--perceptual_weight", 0],
        "SD_CONFIGS": "configs",
        "SD_FLAGS": [*short, "--num_statistics_images", 8, "--report_to", "none"],
        "SD_STEPS": 2,
        "PROMPTS": ["A red wall.", "A blue wall."],
        "REPOSITORY": "org/mine",
        "LAUNCHER": [sys.executable],
    }


def test_the_notebook_runs_from_a_folder_of_photographs_to_the_hub(tmp_path):
    write_inputs(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells), "clear the outputs before committing"
    program = []
    for cell in cells:
        program.append("".join(cell["source"]))
        if "parameters" in cell["metadata"].get("tags", ()):
            settings = small_settings(tmp_path)
            names = {line.partition(" = ")[0] for line in program[-1].splitlines() if " = " in line}
            assert names == settings.keys()
            program += [f"{name} = {value!r}" for name, value in settings.items()]
    hub = Hub()
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_owner"}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    try:
        command = [sys.executable, "-c", "\n".join(program)]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-4000:]
        for name in ("org/mine", "org/mine-pqgan"):
            assert "README.md" in hub.files(name)
    finally:
        hub.close()
    assert "hours for 2 steps" in result.stdout and "pictures are held back" in result.stderr
    assert isinstance(load_autoencoder(str(tmp_path / "out" / "pqgan")), PQModel)
    assert StableDiffusionPQPipeline.from_pretrained(tmp_path / "out" / "stable-diffusion", safety_checker=None)
    with PIL.Image.open(tmp_path / "out" / "pictures.png") as picture:
        assert picture.size == (64, 32)
