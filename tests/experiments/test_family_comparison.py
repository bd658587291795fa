import json
import math

import pytest
import torch
from conftest import tiny_config
from families import FAMILIES, Denoiser, families_table, main, parse_args, steps_to, text_states
from labelled_pictures import write_labelled_pictures
from tiny_pipelines import tiny_kl

from diffusers_pq import PQModel
from diffusers_pq.models.widening import widen_denoiser


@pytest.fixture
def flags(tmp_path):
    write_labelled_pictures(tmp_path / "data")
    torch.manual_seed(0)
    PQModel(**tiny_config()).save_pretrained(tmp_path / "pq")
    tiny_kl().save_pretrained(tmp_path / "kl")
    flags = ["--data_dir", tmp_path / "data", "--source_vae", tmp_path / "kl"]
    flags += ["--target_vae", tmp_path / "pq", "--output_dir", tmp_path, "--resolution", 32, "--train_batch_size", 2]
    flags += ["--source_steps", 2, "--ends_steps", 1, "--steps", 2, "--validation_steps", 1]
    return [str(flag) for flag in flags]


def test_a_family_is_compared_once_for_each_seed(flags, tmp_path, monkeypatch):
    flags += ["--families", "sd3"]
    main(parse_args([*flags, "--seeds", "0"]))
    first = json.loads((tmp_path / "families.json").read_text())["runs"]
    main(parse_args([*flags, "--seeds", "0", "1"]))
    record = json.loads((tmp_path / "families.json").read_text())
    assert record["runs"][0] == first[0] and [run["seed"] for run in record["runs"]] == [0, 1]
    assert all([step for step, _ in run["adapted"]] == [0, 1, 2] for run in record["runs"])
    line = families_table(record).splitlines()[-1]
    assert line.startswith("| Stable Diffusion 3.5 Medium | 1.03M") and " ± " in line and line.endswith(" | 2 |")
    with pytest.raises(ValueError, match="has other settings"):
        main(parse_args([*flags, "--steps", "3"]))
    with pytest.raises(ValueError, match="--ends_steps 2 must be fewer than --steps 2"):
        main(parse_args([*flags, "--ends_steps", "2"]))


def test_families_are_of_like_size_and_widen():
    latents, states = torch.randn(2, 12, 8, 8), torch.stack([text_states("a red bus"), text_states("a leaf")])
    sizes = []
    for family in FAMILIES.values():
        torch.manual_seed(0)
        source = family.create(4, 8)
        sizes.append(source.num_parameters())
        widened = Denoiser(family, widen_denoiser(source, 12))
        with torch.no_grad():
            predicted = widened(latents, torch.tensor([100.0, 900.0]), states)
            swapped = widened(latents, torch.tensor([100.0, 900.0]), states.flip(0))
        assert predicted.shape == latents.shape and torch.equal(predicted[:, :4], predicted[:, 4:8])
        assert not torch.equal(predicted, swapped), "captions are seen"
    assert max(sizes) / min(sizes) < 1.1


def test_steps_to_a_loss():
    curve = [(0, 2.0), (10, 1.0), (20, 1.5), (30, 0.5)]
    assert steps_to(curve, 1.5) == 5 and steps_to(curve, 1.0) == 10 and steps_to(curve, 0.75) == 27.5
    assert math.isnan(steps_to(curve, 0.1))
