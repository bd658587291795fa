import json

import pytest
import torch
from conftest import tiny_config
from diffusers import DDIMScheduler
from labelled_pictures import write_labelled_pictures
from latent_diffusion import timestep_at
from objectives import main, objectives_table, parse_args, train

from diffusers_pq import PQModel
from diffusers_pq.metrics import FID
from diffusers_pq.training.noise import create_scheduler


class Means(torch.nn.Module):
    num_features = 3

    def forward(self, pictures):
        return pictures.float().mean((2, 3))


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Of the smallest comparison, with a feature space that needs no weights."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("objectives.load_fd_efficientnet_lite0", lambda: FID(Means()))
    write_labelled_pictures(tmp_path / "data")
    torch.manual_seed(0)
    PQModel(**tiny_config()).save_pretrained(tmp_path / "pq")
    flags = ["--data_dir", tmp_path / "data", "--vae", tmp_path / "pq", "--label_column", "category"]
    flags += ["--resolution", 32, "--steps", 2, "--num_samples", 3, "--num_inference_steps", 2, "--widths", 16]
    flags += ["--runs_dir", tmp_path / "runs", "--output_dir", tmp_path / "results", "--shifts", "auto"]
    return [str(flag) for flag in flags]


def test_every_combination_is_trained_and_measured_once_and_spread_over_the_seeds(
    flags, tmp_path, capsys, monkeypatch
):
    chosen = ["--objectives", "flow, sample"]
    main(parse_args([*flags, *chosen, "--seeds", "0"]))
    trained = []
    monkeypatch.setattr("objectives.train", lambda args, *which: trained.append(which) or train(args, *which))
    main(parse_args([*flags, *chosen, "--seeds", "0", "1"]))
    assert [which["seed"] for _, which in trained] == [1], "the first is done"
    record = json.loads((tmp_path / "results" / "objectives.json").read_text())
    assert [(run["objective"], run["seed"]) for run in record["runs"]] == [("flow, sample", 0), ("flow, sample", 1)]
    assert all(len(run["psnr"]) == 3 and run["frechet_distance"] > 0 for run in record["runs"])
    first, _, line = objectives_table(record).splitlines()
    assert first.startswith("| objective | width | shift | PSNR from SNR 10 (dB) |")
    assert line.startswith("| flow, sample | 16 | auto | ") and " ± " in line and line.endswith(" | 2 |")
    with pytest.raises(ValueError, match="has other settings"):
        main(parse_args([*flags, *chosen, "--steps", "3"]))


@pytest.mark.parametrize("ratio", [10, 1, 0.1])
def test_timesteps_have_the_ratio_that_is_asked_for(ratio):
    timestep, found = timestep_at(create_scheduler("flow_matching", shift=3.0), ratio)
    sigma = timestep / 1000
    assert ((1 - sigma) / sigma) ** 2 == pytest.approx(ratio) and found == ratio
    scheduler = DDIMScheduler()
    timestep, found = timestep_at(scheduler, ratio)
    alpha = float(scheduler.alphas_cumprod[timestep])
    assert alpha / (1 - alpha) == pytest.approx(found) and found == pytest.approx(ratio, rel=0.03)
