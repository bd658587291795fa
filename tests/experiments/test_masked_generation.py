"""The comparison of masked generation with latent diffusion, on pipelines that are not trained."""

import json
import re

import masked_generation
import numpy as np
import PIL.Image
import pytest
import torch
from masked_generation import SYSTEMS, CoarseToFine, check_alike, parse_args, results_table
from test_generation import Thumbnails
from test_pipeline_latent_diffusion_pq import make as latent_diffusion
from test_pipeline_masked_pq import NAMES
from test_pipeline_masked_pq import make as masked

from diffusers_pq.metrics import FID


def record(system, seed=0, parameters=100, **settings):
    measured = {"order": "confidence", "steps": 8, "seconds_per_picture": 0.5}
    measured["distances"] = {"train": 10.0 + seed, "held_out": 20.0}
    common = {"max_train_steps": 3, "train_batch_size": 2, "resolution": 32, "data": "emoji", "label_column": "group"}
    common |= {"num_samples": 4, "num_references": 4}
    kept = {"date": "2026-01-01", "machine": "a machine", "settings": common | settings, "parameters": parameters}
    return {"system": system, "seed": seed, "samples": {"confidence-8": measured}, **kept}


def test_the_comparison_trains_measures_and_shows_what_was_not_done_before(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        for number in range(4):
            folder = tmp_path / "data" / split / ("abc"[number % 3])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    trained = []

    def train(system, seed, folder, args):
        if not (folder / "model_index.json").is_file():
            trained.append((system.title, seed))
            (masked() if system.is_masked else latent_diffusion(names=NAMES)).save_pretrained(folder)

    monkeypatch.setattr(masked_generation, "train", train)
    monkeypatch.setattr(masked_generation, "load_fd_efficientnet_lite0", lambda: FID(Thumbnails()))
    monkeypatch.setattr(masked_generation, "DIFFUSION_STEPS", 2)
    monkeypatch.setattr(masked_generation, "MOST_UNLIKE", 100)
    flags = [
        "--data_dir",
        str(tmp_path / "data"),
        "--label_column",
        "label",
        "--resolution",
        "32",
        "--seeds",
        "0",
        "1",
    ]
    flags += [
        "--systems",
        "masked-pq",
        "diffusion-pq",
        "--steps",
        "2",
        "4",
        "--orders",
        "confidence",
        "coarse_to_fine",
    ]
    flags += ["--num_samples", "4", "--num_references", "4", "--batch_size", "2"]
    flags += ["--runs_dir", str(tmp_path / "runs"), "--output_dir", str(tmp_path)]
    masked_generation.main(parse_args(flags))
    result = json.loads((tmp_path / "masked_generation.json").read_text())
    assert [(run["system"], run["seed"]) for run in result["runs"]] == [
        ("masked-pq", 0), ("masked-pq", 1), ("diffusion-pq", 0), ("diffusion-pq", 1),
    ]  # fmt: skip
    first, second, diffusion, _ = result["runs"]
    assert list(first["samples"]) == ["confidence-2", "confidence-4", "coarse_to_fine-2"]
    assert list(second["samples"]) == ["confidence-2"] and list(diffusion["samples"]) == ["diffusion-2"]
    assert first["bits_per_code"]["uniform"] == 4 and "bits_per_code" not in diffusion
    assert first["reconstructions"]["held_out"] >= 0 and "reconstructions" not in second
    picture = (tmp_path / "masked_generation_samples.jpg").read_bytes()
    masked_generation.main(parse_args(flags))
    assert len(trained) == 4 and json.loads((tmp_path / "masked_generation.json").read_text()) == result
    assert (tmp_path / "masked_generation_samples.jpg").read_bytes() == picture
    with pytest.raises(ValueError, match="choose another --runs_dir"):
        masked_generation.main(parse_args([*flags, "--train_batch_size", "5", "--seeds", "0", "1", "2"]))


def test_subspaces_are_generated_from_coarse_to_fine():
    pipeline = masked()
    with torch.no_grad():
        pipeline.vae.quantizer.codebooks *= torch.tensor([0.1, 1.0, 10.0, 0.01]).view(-1, 1, 1)
    painter = CoarseToFine(pipeline)
    assert torch.cat(painter.groups).tolist() == [2, 1, 0, 3]
    known = []
    call = type(pipeline).__call__

    def spy(self, codes, **options):
        known.append((codes >= 0).all((0, 2, 3)).tolist())
        return call(self, codes=codes, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipeline), "__call__", spy)
        pictures = painter(class_labels=[0, 1], num_inference_steps=8, output_type="np").images
    assert pictures.shape == (2, 32, 32, 3)
    assert known == [[False] * 4, [False, False, True, False], [False, True, True, False], [True, True, True, False]]


def test_systems_that_were_not_trained_alike_are_refused():
    check_alike([record("masked-pq"), record("diffusion-pq", parameters=91)])
    with pytest.raises(ValueError, match="diffusion-pq has 89 parameters, masked-pq 100: more than 10 % apart"):
        check_alike([record("masked-pq"), record("diffusion-pq", parameters=89)])
    with pytest.raises(ValueError, match=re.escape("diffusion-pq, seed 1, was made with")):
        check_alike([record("masked-pq"), record("diffusion-pq", 1, max_train_steps=4)])


def test_the_table_has_means_and_spreads_over_seeds():
    runs = [record("masked-pq"), record("masked-pq", 1), record("diffusion-kl")]
    table = results_table({"titles": {name: system.title for name, system in SYSTEMS.items()}, "runs": runs})
    assert "| masked codes, PQ (S = 32) | 0.00M | 2 | 8 | 10.5 ± 0.7071 | 20 ± 0 | - | 0.5 ± 0 | - | - |" in table
    assert "| latent diffusion, KL latents | 0.00M | 1 | 8 | 10 | 20 | - | 0.5 | - | - |" in table
    assert "2026-01-01, a machine: 3 steps of 2 pictures of 32 px of emoji by `group`; seeds 0, 1;" in table
