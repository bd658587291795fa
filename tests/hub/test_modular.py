"""Modular pipelines are saved and uploaded, and load and paint in a process where this package is not importable."""

import PIL.Image
import pytest
import torch
from alone import run_alone
from conftest import tiny_config
from diffusers import ModularPipeline
from hub_stand_in import Hub
from tiny_pipelines import stable_diffusion_3, stable_diffusion_xl

from diffusers_pq import (
    FluxPQBlocks,
    LatentDiffusionPQPipeline,
    PQModel,
    StableDiffusion3PQPipeline,
    StableDiffusionXLPQPipeline,
)
from diffusers_pq.cli import main
from diffusers_pq.files import read_json
from diffusers_pq.hub.modular import save_modular, to_modular


PIPELINES = {
    "xl": (StableDiffusionXLPQPipeline, stable_diffusion_xl),
    "sd3": (StableDiffusion3PQPipeline, stable_diffusion_3),
}
LOAD = """
import os
import shutil
import sys

import torch
from huggingface_hub import create_repo, upload_folder
from diffusers import ModularPipeline, ModularPipelineBlocks
from diffusers.commands.diffusers_cli import main

def paint(name):
    create_repo(f"org/{name}")
    upload_folder(repo_id=f"org/{name}", folder_path=f"{root}/{name}")
    shutil.rmtree(f"{root}/{name}")
    pipeline = ModularPipeline.from_pretrained(f"org/{name}", trust_remote_code=True)
    pipeline.load_components(trust_remote_code=True)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    images = pipeline(prompt="a red ladybug", negative_prompt="", **options, output="images")
    torch.testing.assert_close(images, torch.load(f"{root}/{name}.pt", weights_only=True), atol=1e-4, rtol=1e-4)
    return type(pipeline).__name__

names = [paint(name) for name in ("xl", "sd3")]
assert names == ["StableDiffusionXLModularPipeline", "StableDiffusion3ModularPipeline"], names

# The commands of diffusers: one runs the repository, ...
sys.argv = ["diffusers-cli", "run", "--model", "org/xl", "--trust-remote-code", "--device-map", "cpu"]
sys.argv += ["--pipeline-kwargs", '{"prompt": "a bus", "num_inference_steps": 2}', "--output-key", "images"]
sys.argv += ["--output", f"{root}/painted.png"]
main()

# ... the other packages blocks, and writes the same code and the same class.
os.chdir(f"{root}/cli")
sys.argv = ["diffusers-cli", "custom_blocks", "--block_module_name", "modular_blocks_pq.py"]
sys.argv += ["--block_class_name", "StableDiffusionXLPQBlocks"]
main()
blocks = ModularPipelineBlocks.from_pretrained(f"{root}/cli", trust_remote_code=True)
assert type(blocks.sub_blocks["decode"]).__name__ == "PQDecodeStep"
blocks.save_pretrained(f"{root}/again")
print("null")
"""


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return PQModel(**tiny_config(latents_mean=[0.1] * 8, latents_std=[2.0] * 8)).eval()


def test_repositories_load_and_paint_without_the_package(vae, tmp_path):
    hub = Hub()
    try:
        for name, (pipeline_class, components) in PIPELINES.items():
            modular = to_modular(pipeline_class(**components(vae, 8), guidance_scale=3.0))
            save_modular(modular, tmp_path / name, repo_id=f"org/{name}")
            options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
            images = modular(prompt="a red ladybug", negative_prompt="", **options, output="images")
            torch.save(images, tmp_path / f"{name}.pt")
        code = (tmp_path / "xl/modular_blocks_pq.py").read_text()
        config = read_json(tmp_path / "xl/modular_config.json")
        (tmp_path / "cli").mkdir()
        (tmp_path / "cli/modular_blocks_pq.py").write_text(code)
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment["HF_TOKEN"] = "hf_owner"
        run_alone(f"root = {str(tmp_path)!r}" + LOAD, **environment)
    finally:
        hub.close()
    with PIL.Image.open(tmp_path / "painted.png") as painted:
        assert painted.size == (32, 32)
    assert (tmp_path / "again/modular_blocks_pq.py").read_text() == code
    assert read_json(tmp_path / "cli/modular_config.json") == config
    assert (tmp_path / "cli/modular_model_index.json").is_file()


def test_the_command_saves_a_folder_that_loads_from_wherever_it_is_moved(vae, tmp_path, capsys):
    StableDiffusionXLPQPipeline(**stable_diffusion_xl(vae, 8)).save_pretrained(tmp_path / "pipeline")
    command = ["save-modular", str(tmp_path / "pipeline"), str(tmp_path / "saved")]
    assert main(command) == 0
    assert main(command) == 1 and "exists already" in capsys.readouterr().err
    index = read_json(tmp_path / "saved/modular_model_index.json")
    assert index["vae"][:2] == [None, None] and index["vae"][2]["type_hint"] == [None, None]
    assert index["unet"][:2] == ["diffusers", "UNet2DConditionModel"]
    assert index["unet"][2]["pretrained_model_name_or_path"] == str(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "moved")
    pipeline = ModularPipeline.from_pretrained(str(tmp_path / "moved"), trust_remote_code=True)
    pipeline.load_components(trust_remote_code=True)
    assert isinstance(pipeline.vae, PQModel) and pipeline.unet.config.in_channels == 8
    assert pipeline.guider.guidance_scale == 5.0


def test_what_has_no_blocks_or_is_incomplete_is_named(tmp_path, capsys):
    class Painter(LatentDiffusionPQPipeline):
        def __init__(self):
            pass

    with pytest.raises(TypeError, match="A Painter has no modular blocks: only pipelines of StableDiffusionXLPQ"):
        to_modular(Painter())
    with pytest.raises(ValueError, match="The pipeline lacks vae, scheduler: `update_components` before saving"):
        save_modular(FluxPQBlocks().init_pipeline(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model_index.json").write_text('{"_class_name": ["pipeline", "Painter"]}')
    assert main(["save-modular", str(tmp_path / "other"), str(tmp_path / "new")]) == 1
    assert "holds a Painter: only pipelines of StableDiffusionXLPQ" in capsys.readouterr().err
