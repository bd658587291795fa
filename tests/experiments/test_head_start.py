import json

import head_start
import numpy as np
import pytest
import tiny_pipelines
import torch
from conftest import tiny_config
from diffusers import StableDiffusionPipeline
from head_start import SCORES, head_start_table, main, parse_args
from labelled_pictures import write_labelled_pictures
from PIL import Image
from text_agreement import TextAgreement, picture_features

from diffusers_pq import PQModel
from diffusers_pq.metrics import FID


class Means(torch.nn.Module):
    num_features = 3

    def forward(self, pictures):
        return pictures.float().mean((2, 3))


@pytest.fixture
def features(monkeypatch):
    """A feature space that needs no weights."""
    monkeypatch.setattr("text_agreement.load_fd_efficientnet_lite0", lambda: FID(Means()))


@pytest.fixture
def flags(tmp_path, monkeypatch, features):
    """Of the smallest experiment."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    write_labelled_pictures(tmp_path / "data")
    for path in (tmp_path / "data").glob("*/metadata.jsonl"):
        lines = path.read_text().replace('"category"', '"subject"').replace('"number"', '"style"')
        path.write_text(lines.replace("wall", "bus"))  # which the tokenizer knows
    torch.manual_seed(0)
    parts = tiny_pipelines.stable_diffusion(tiny_pipelines.tiny_kl(), 4)
    StableDiffusionPipeline(**parts).save_pretrained(tmp_path / "source")
    PQModel(**tiny_config()).save_pretrained(tmp_path / "pq")
    flags = ["--source", tmp_path / "source", "--vae", tmp_path / "pq", "--data_dir", tmp_path / "data"]
    flags += ["--resolution", 32, "--checkpoints", 1, 2, "--num_samples", 3, "--num_inference_steps", 2]
    flags += ["--runs_dir", tmp_path / "runs", "--output_dir", tmp_path / "results"]
    return [str(flag) for flag in flags]


def test_starts_are_measured_at_each_checkpoint_once_and_spread_over_the_seeds(flags, tmp_path, monkeypatch):
    main(parse_args([*flags, "--starts", "copy, one stage", "--seeds", "0"]))
    path = tmp_path / "results" / "head_start.json"
    first, second = json.loads(path.read_text())["runs"]
    assert first["loss"] != second["loss"], "the second step was taken"
    trained = []
    monkeypatch.setattr(head_start, "train", lambda args, folder, *which: trained.append(which))
    monkeypatch.setattr(head_start, "measure", lambda *_: {name: first[name] + 0.5 for name in SCORES})
    main(parse_args([*flags, "--starts", "copy, one stage", "--seeds", "0", "1"]))
    assert trained == [("copy, one stage", 1, 1), ("copy, one stage", 1, 2)], "the first seed is done"
    record = json.loads(path.read_text())
    assert record["held_out_pictures"]["subject"] == 1
    _, _, head, _, _, line, _ = head_start_table(record).splitlines()
    assert head.startswith("| start | steps | held-out loss | FD, EfficientNet-Lite0 |")
    assert line.startswith("| copy, one stage | 1 | ") and " ± 0.354 |" in line and line.endswith(" | 2 |")
    assert (tmp_path / "results" / "head_start.png").is_file()
    with pytest.raises(ValueError, match="has other settings"):
        main(parse_args([*flags, "--num_samples", "2"]))


def test_agreement_is_the_share_of_pictures_that_show_what_is_asked_for(features):
    colours = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
    noise = np.random.default_rng(0).integers(0, 30, (4, 8, 8, 3)).astype(np.uint8)
    pictures = [Image.fromarray(noise[number] + np.uint8(colour)) for colour in colours.values() for number in (0, 1)]
    names = [name for name in colours for _ in (0, 1)]
    agreement = TextAgreement.fit(picture_features(pictures), {"subject": names})
    red = [Image.fromarray(noise[number] + np.uint8(colours["red"])) for number in (2, 3)]
    red = picture_features(red)
    assert agreement.accuracy(red, {"subject": ["red", "red"]}) == {"subject": 1, "subject_top5": 1}
    assert agreement.accuracy(red, {"subject": ["red", "blue"]})["subject"] == 0.5
