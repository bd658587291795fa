import json
import math
import runpy
import statistics
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from bottlenecks import (
    BOTTLENECKS,
    FiniteScalarQuantizer,
    MultiChannelQuantizer,
    ResidualQuantizer,
    create_bottleneck,
    fit_quantizer,
    load_bottleneck,
)
from conftest import tiny_config
from diffusers import AutoencoderKL

from diffusers_pq import PQModel, ProductQuantizer
from diffusers_pq.evaluation.reconstruction import describe_latents
from diffusers_pq.reconstruction import reconstruct


pytest.importorskip("vector_quantize_pytorch")
SCRIPT = Path(__file__).parents[2] / "experiments" / "quantizer_comparison.py"
QUANTIZERS = [name for name in BOTTLENECKS if name not in ("kl", "none")]


@pytest.fixture
def latents():
    """Of d = 8, with channels of very different spread."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 8, 16, 16, generator=generator) * torch.logspace(-1, 1, 8).view(1, -1, 1, 1)


def test_all_but_two_take_the_bits_of_the_product_quantiser():
    bits = {name: describe_latents(create_bottleneck(name, tiny_config(), 1024).eval(), 32) for name in BOTTLENECKS}
    found = {name: latents["bits_per_pixel"] * 4**2 for name, latents in bits.items()}
    # S log2 K = 4 * 4 bits: 8 channels of 2 bits, or one of 16
    same = dict.fromkeys(("multi_channel", "residual", "scalar", "fsq", "kl", "pq"), 16)
    assert found == same | {"vq": 10, "none": 16}  # codes of the untrained `none`, which is evaluated without
    assert bits["kl"]["latent_channels"] == 1 and bits["scalar"]["codebook_size"] == 4


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_the_backbone_is_the_same(name):
    model, reference = create_bottleneck(name, tiny_config()), PQModel(**tiny_config())
    assert isinstance(model, AutoencoderKL if name == "kl" else PQModel)
    for mine, theirs in zip(model.encoder.down_blocks.parameters(), reference.encoder.down_blocks.parameters()):
        assert mine.shape == theirs.shape
    assert len(list(model.decoder.parameters())) == len(list(reference.decoder.parameters()))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantiser_is_used_like_ours_and_is_better_after_its_fit(name, latents):
    torch.manual_seed(0)
    quantizer = create_bottleneck(name, tiny_config(), 64).quantizer
    before = quantizer(latents).latents
    fit_quantizer(quantizer, latents)
    inputs = latents.clone().requires_grad_()
    output = quantizer.train()(inputs)
    assert output.codes.shape == (2, quantizer.num_subspaces, 16, 16) and output.codes.dtype == torch.long
    assert output.codes.min() >= 0 and output.codes.max() < quantizer.codebook_size
    error = (output.latents - latents).square().mean()
    assert error < 0.5 * (before - latents).square().mean()
    if name != "fsq":  # which has neither codebooks nor their loss
        torch.testing.assert_close(output.loss, 1.25 * error)  # Eq. 1 with beta = 0.25
        output.loss.backward(retain_graph=True)
        assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())
        inputs.grad = None
        output.latents.sum().backward()
        torch.testing.assert_close(inputs.grad, torch.ones_like(inputs))  # straight through
    with pytest.raises(ValueError, match=r"shape \[batch, 8, height, width\]"):
        quantizer(latents[:, :4])


def test_multi_channel_quantisation_is_product_quantisation_with_equal_codebooks(latents):
    shared, separate = MultiChannelQuantizer(8, 4, 16), ProductQuantizer(8, 4, 16)
    assert shared.codebooks.numel() == 16 * 2
    separate.codebooks.data.copy_(shared.codebooks.expand(4, -1, -1))
    assert torch.equal(shared(latents).codes, separate(latents).codes)
    assert torch.equal(shared(latents).latents, separate(latents).latents)


@torch.no_grad()
def test_every_stage_of_a_residual_quantiser_adds_an_entry_nearest_to_what_is_left(latents):
    quantizer = ResidualQuantizer(8, 3, 16)
    quantizer.fit(latents)
    output = quantizer(latents)
    left = latents.movedim(1, -1)
    for stage, codebook in enumerate(quantizer.library.codebooks):
        codes = output.codes[:, stage]
        assert torch.equal(codes, torch.cdist(left.flatten(0, 2), codebook).argmin(-1).view_as(codes))
        left = left - codebook[codes]
    torch.testing.assert_close(left, (latents - output.latents).movedim(1, -1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_finite_scalar_quantisation_rounds_to_a_grid_over_two_standard_deviations(latents):
    quantizer = FiniteScalarQuantizer(8, levels=5)
    quantizer.fit(latents)
    spread = latents.transpose(0, 1).flatten(1).std(1).view(1, -1, 1, 1)
    steps = quantizer(latents).latents / spread
    assert torch.equal(steps.unique().round(decimals=3), torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]))


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_a_saved_bottleneck_is_loaded_as_it_was(name, images, latents, tmp_path):
    torch.manual_seed(0)
    model = create_bottleneck(name, tiny_config(), 64).eval()
    if name not in ("kl", "none"):
        fit_quantizer(model.quantizer, latents)
    model.save_pretrained(tmp_path)
    loaded = load_bottleneck(name, tmp_path, tiny_config(), 64)
    output = reconstruct(loaded, images)
    if name == "none":  # evaluated as it was trained, without the quantiser
        with torch.no_grad():
            expected = model.decode(model.encode(images).latents, quantize=False).sample
        assert output.codes is None and torch.equal(output.sample, expected)
    else:
        assert torch.equal(output.sample, reconstruct(model, images).sample)


def test_the_command_trains_evaluates_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no weights of metrics here, whatever this machine has
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(4):
            noise = PIL.Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            noise.resize((48, 36), PIL.Image.Resampling.BICUBIC).save(tmp_path / "data" / split / f"{number}.png")
    (tmp_path / "test" / "test").mkdir(parents=True)
    noise.resize((40, 50)).save(tmp_path / "test" / "test" / "one.png")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config() | {"_class_name": "PQModel"}))
    script = runpy.run_path(str(SCRIPT))

    def run(*bottlenecks, steps=2, seeds=(0,)):
        flags = ["--train_data_dir", tmp_path / "data", "--cache_dir", tmp_path / "cache", "--resolution", 32]
        flags += ["--train_batch_size", 2, "--max_train_steps", steps, "--perceptual_weight", 0, "--report_to", "none"]
        flags += ["--discriminator_weight", 0, "--weight_init", "pca", "--codebook_init", "kmeans", "--seed", 0]
        own = ["--model_config", tmp_path / "config.json", "--vq_codebook_size", 32, "--eval_resolution", 32]
        own += ["--seeds", *seeds, "--test_dir", tmp_path / "test"]
        own += ["--runs_dir", tmp_path / "runs", "--output_dir", tmp_path / "out", "--bottlenecks", *bottlenecks]
        script["main"](script["parse_args"]([str(part) for part in (*own, "--", *flags)]))

    run("none")
    (first,) = json.loads((tmp_path / "out" / "quantizer_comparison.json").read_text())
    weights = tmp_path / "runs" / "seed0" / "none" / "diffusion_pytorch_model.safetensors"
    written = weights.stat().st_mtime_ns
    run("none", "fsq")
    assert weights.stat().st_mtime_ns == written
    results = json.loads((tmp_path / "out" / "quantizer_comparison.json").read_text())
    assert [result["name"] for result in results] == ["fsq", "none"] and results[1] == first
    for result in results:
        scores = result["validation"]["scores"]
        assert result["photographs"]["pictures"] == 6 and result["validation"]["pictures"] == 4
        assert math.isfinite(scores["psnr"]) and ("H_n" in scores) == (result["name"] == "fsq")
        assert {"rfid", "cmmd", "lpips_alex"} <= result["validation"]["unavailable"].keys()
    table = (tmp_path / "out" / "quantizer_comparison.md").read_text()
    assert "2 steps of 2 crops of 32 px of data for each" in table and table in capsys.readouterr().out
    assert f"| none | 8 | - | - | 128 | 8 | {first['photographs']['scores']['psnr']:.2f} |" in table
    run("none", seeds=(0, 1))
    results = json.loads((tmp_path / "out" / "quantizer_comparison.json").read_text())
    assert [result["settings"]["seed"] for result in results] == [0, 0, 1]
    tested = [result["test"] for result in results]
    assert all(one["pictures"] == 1 and math.isfinite(one["scores"]["psnr"]) for one in tested)
    table = (tmp_path / "out" / "quantizer_comparison.md").read_text()
    scores = [result["test"]["scores"]["psnr_pooled"] for result in results if result["name"] == "none"]
    assert f"| {statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f} |" in table
    assert "2 seeds (mean ± standard deviation)" in table and "test photographs: PSNR, pooled" in table
    with pytest.raises(ValueError, match="max_train_steps 2 there, 3 now"):
        run("fsq", steps=3)
