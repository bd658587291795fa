"""Creates, adapts and resumes small Stable Diffusion pipelines with the real scripts on real files."""

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from scripts import run_script
from test_checkpoints import poison

from diffusers_pq import PQModel, QuantizedAutoencoder, StableDiffusionPQPipeline, product_quantize, widen_unet
from diffusers_pq.autoencoders import channel_weights, encode_latents, scale_latents, set_latent_statistics
from diffusers_pq.data.latent_cache import load_cached_codes, pack_codes, unpack_codes
from diffusers_pq.flags import parse
from diffusers_pq.hub.push import check_folder
from diffusers_pq.images import to_tensor
from diffusers_pq.training.denoiser import Stage, find_stage
from diffusers_pq.training.noise import denoising_loss
from diffusers_pq.training.stable_diffusion import (
    AdaptationOptions,
    _validation_prompts,
    adapt_stable_diffusion,
    train_clip_tokenizer,
)


SCRIPTS = Path(__file__).parents[2] / "training_scripts"
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
TEXT_ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def run(script, *arguments):
    return run_script(SCRIPTS / script, *arguments)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Captioned pictures, a PQ and a KL autoencoder, and an untrained pipeline on the latter."""
    folder = tmp_path_factory.mktemp("pqsd")
    generator = np.random.default_rng(0)
    for split, count in (("train", 9), ("validation", 3)):
        (folder / "data" / split).mkdir(parents=True)
        lines = []
        for number in range(count):
            name, colour = list(COLOURS.items())[number % 3]
            pixels = (np.array(colour) + generator.integers(0, 40, (40, 56, 3))).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(folder / "data" / split / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "text": f"A {name} wall"}))
        (folder / "data" / split / "metadata.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)
    PQModel(**tiny_config()).save_pretrained(folder / "pq")
    kl_blocks = {name: tiny_config()[name] for name in ("down_block_types", "up_block_types", "block_out_channels")}
    AutoencoderKL(**kl_blocks, norm_num_groups=4).save_pretrained(folder / "kl")
    (folder / "configs").mkdir()
    (folder / "configs" / "unet.json").write_text(json.dumps(UNET))
    (folder / "configs" / "text_encoder.json").write_text(json.dumps(TEXT_ENCODER))
    arguments = ("--train_data_dir", folder / "data", "--vae_name_or_path", folder / "kl", "--max_length", 8)
    arguments += ("--config_dir", folder / "configs", "--vocab_size", 530, "--output_dir", folder / "sd")
    run("create_stable_diffusion.py", *arguments)
    return folder


def adapt(workspace, output, *extra, stages="32:2:1e-2:conv 40:3:1e-2:all"):
    arguments = ("--pretrained_model_name_or_path", workspace / "sd", "--train_data_dir", workspace / "data")
    arguments += ("--cache_dir", workspace / "cache", "--stages", stages, "--min_image_side", 1)
    arguments += ("--train_batch_size", 2, "--num_statistics_images", 6, "--output_dir", workspace / output)
    return run("train_pqsd.py", *arguments, *extra)


def unet_weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_an_untrained_pipeline_has_the_captions_tokens_and_paints(workspace):
    pipeline = StableDiffusionPipeline.from_pretrained(workspace / "sd")
    tokens = pipeline.tokenizer("a RED wall").input_ids
    assert tokens[0] == pipeline.tokenizer.bos_token_id and tokens[-1] == pipeline.tokenizer.eos_token_id
    assert len(tokens) == 5 and pipeline.tokenizer.decode(tokens, skip_special_tokens=True) == "a red wall"
    assert pipeline.tokenizer.model_max_length == 8
    assert pipeline("a red wall", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)


def test_a_tokenizer_spells_words_that_no_caption_has(workspace):
    tokenizer = train_clip_tokenizer(["a red wall", "a blue wall"] * 3, 530, 77)
    tokens = tokenizer("zebra").input_ids
    assert tokenizer.unk_token_id not in tokens[1:-1] and tokenizer.decode(tokens, skip_special_tokens=True) == "zebra"


def test_adapts_a_pipeline_in_two_stages_and_resumes_exactly(workspace):
    extra = ("--vae_name_or_path", workspace / "pq", "--checkpointing_steps", 1, "--use_ema", "--random_flip")
    extra += ("--validation_steps", 2, "--validation_prompts", "a red wall", "--dataloader_num_workers", 1)
    extra += ("--lr_scheduler", "cosine", "--streaming", "--shuffle_buffer", 4, "--noise_shift", "auto")
    extra += ("--guidance_scale", 3)
    adapt(workspace, "whole", *extra)
    pipeline = StableDiffusionPQPipeline.from_pretrained(workspace / "whole", safety_checker=None)
    assert_noise_is_shifted(StableDiffusionPipeline.from_pretrained(workspace / "sd"), pipeline)
    assert len(pipeline.vae.config.latents_std) == 8 and pipeline.unet.config.in_channels == 8
    assert pipeline.config.guidance_scale == 3
    assert pipeline("a red wall", num_inference_steps=2, output_type="np").images.shape == (1, 40, 40, 3)
    assert json.loads((workspace / "whole" / "best" / "validation.json").read_text())["loss"] > 0
    assert StableDiffusionPQPipeline.from_pretrained(workspace / "whole" / "best", safety_checker=None)
    assert check_folder(workspace / "whole" / "best").data.library_name == "diffusers"
    expected = unet_weights(workspace / "whole")
    # Within the first stage, at the change of stages, and within the second.
    for step in (1, 2, 4):
        checkpoint = workspace / "whole" / f"checkpoint-{step}"
        output = workspace / f"resumed-{step}"
        result = adapt(workspace, output.name, *extra, "--resume_from_checkpoint", checkpoint)
        assert f"Resumed from {checkpoint}" in result.stdout
        assert all(torch.equal(value, expected[name]) for name, value in unet_weights(output).items())


def assert_noise_is_shifted(source, adapted):
    """By how many more values the latents have."""
    values = [unet.config.in_channels * unet.config.sample_size**2 for unet in (source.unet, adapted.unet)]
    alphas = [pipeline.scheduler.alphas_cumprod for pipeline in (source, adapted)]
    ratio = (alphas[0] / (1 - alphas[0])) / (alphas[1] / (1 - alphas[1]))
    torch.testing.assert_close(ratio, torch.full_like(ratio, values[1] / values[0]), rtol=1e-3, atol=0)


def test_the_first_stage_trains_the_first_and_last_convolution_only(workspace):
    extra = ("--vae_name_or_path", workspace / "pq", "--unet_init", "copy_scaled", "--prediction_type", "sample")
    extra += ("--noise_offset", "0.1", "--input_perturbation", "0.1")
    adapt(workspace, "conv", *extra, stages="32:2:1e-2:conv")
    trained = StableDiffusionPQPipeline.from_pretrained(workspace / "conv", safety_checker=None)
    assert trained.scheduler.config.prediction_type == "sample"
    source = StableDiffusionPipeline.from_pretrained(workspace / "sd").unet
    start = widen_unet(source, 8, "copy_scaled").state_dict()
    changed = {
        name.split(".")[0] for name, value in unet_weights(workspace / "conv").items() if not value.equal(start[name])
    }
    assert changed == {"conv_in", "conv_out"}
    adapt(workspace, "again", "--pretrained_model_name_or_path", workspace / "conv", stages="32:1:1e-2:all")
    pipeline = StableDiffusionPQPipeline.from_pretrained(workspace / "again", safety_checker=None)
    assert pipeline.unet.config.in_channels == 8


def test_trains_the_text_encoder_of_a_pipeline_on_kl_latents_stored_in_half_precision(workspace):
    source = StableDiffusionPipeline.from_pretrained(workspace / "sd", dtype=torch.float16)
    source.save_pretrained(workspace / "sd16")
    config = workspace / "sd16" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_diffusers_version": "0.6.0"}))
    extra = ("--pretrained_model_name_or_path", workspace / "sd16", "--train_text_encoder", "--snr_gamma", 5)
    adapt(workspace, "kl-run", *extra, stages="32:2:1e-2:all")
    before = source.text_encoder.float().state_dict()
    trained = StableDiffusionPipeline.from_pretrained(workspace / "kl-run", safety_checker=None)
    assert any(not value.equal(before[name]) for name, value in trained.text_encoder.state_dict().items())
    assert trained.vae.config.scaling_factor != 1.0
    assert trained.text_encoder.dtype == trained.unet.dtype == torch.float32
    assert trained.unet.config.sample_size == 8, "of the last stage, not the 64 that diffusers gives old UNets"


def test_trains_lora_layers_that_our_pipelines_load(workspace):
    extra = ("--lora_rank", 2, "--unet_init", "zero", "--noise_shift", 2)
    adapt(workspace, "lora", "--vae_name_or_path", workspace / "pq", *extra)
    saved = DDIMScheduler.from_pretrained(workspace / "lora", subfolder="scheduler")
    assert saved.config.trained_betas is not None, "the shifted schedule"
    vae = PQModel.from_pretrained(workspace / "lora" / "vae")
    assert vae.config.latents_std is not None
    pipeline = StableDiffusionPQPipeline.from_stable_diffusion(workspace / "sd", vae=vae, init="zero")
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(workspace / "lora")
    after = {name.replace("base_layer.", ""): value for name, value in pipeline.unet.state_dict().items()}
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {"conv_in", "conv_out"}
    assert any(value.any() for name, value in after.items() if "lora_B" in name)
    assert pipeline("a red wall", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    other = StableDiffusionPQPipeline.from_stable_diffusion(
        workspace / "sd", vae=PQModel(**tiny_config(latent_channels=12, latents_mean=None, latents_std=None))
    )
    with pytest.raises(ValueError, match="The adapter is for 8 latent channels, but the `unet` has 12"):
        other.load_lora_weights(workspace / "lora")


def test_trains_from_cached_codes_as_from_pictures(workspace):
    cache = ("--vae_name_or_path", workspace / "pq", "--train_data_dir", workspace / "data", "--min_image_side", 1)
    cache += ("--output_dir", workspace / "codes", "--rows_per_shard", 4, "--batch_size", 2)
    for resolution in (32, 40):
        run("encode_dataset.py", *cache, "--resolution", resolution)
    shards = sorted((workspace / "codes" / "32").glob("*.parquet"))
    assert len(shards) == 3
    before = shards[0].stat().st_mtime_ns
    shards[1].unlink()
    result = run("encode_dataset.py", *cache, "--resolution", 32)
    assert "1 shards written, 0 pictures skipped" in result.stdout and shards[0].stat().st_mtime_ns == before
    extra = ("--vae_name_or_path", workspace / "pq", "--center_crop")
    adapt(workspace, "pictures", *extra)
    adapt(workspace, "cached", *extra, "--latents_dir", workspace / "codes")
    weights = unet_weights(workspace / "pictures")
    assert all(torch.equal(value, weights[name]) for name, value in unet_weights(workspace / "cached").items())


def test_latents_kept_in_memory_train_as_their_pictures(workspace):
    extra = ("--center_crop",)
    for name, vae in (("pq", workspace / "pq"), ("kl", workspace / "kl")):
        vae = ("--vae_name_or_path", vae)
        adapt(workspace, f"{name}-each", *vae, *extra)
        result = adapt(workspace, f"{name}-once", *vae, *extra, "--cache_latents")
        assert result.stdout.count("9 pictures are encoded: 0.00 GiB") == 2, "once in each stage"
        weights = unet_weights(workspace / f"{name}-each")
        for key, value in unet_weights(workspace / f"{name}-once").items():
            # Only the batches in which pictures are encoded differ. Codes do not notice; Adam's first steps follow the
            # sign of a gradient, and of the smallest ones rounding changes it.
            assert (value - weights[key]).abs().mean() <= (0 if name == "pq" else 1e-4)


def test_trains_on_pictures_of_many_proportions_and_resumes_exactly(workspace):
    folder = workspace / "proportions" / "train"
    folder.mkdir(parents=True)
    lines = []
    for number, size in enumerate([(48, 48), (64, 40), (40, 64), (70, 36), (50, 46), (44, 60), (36, 72)]):
        PIL.Image.effect_noise(size, 60).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": "A red wall"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    extra = ("--vae_name_or_path", workspace / "pq", "--train_data_dir", folder.parent, "--validation_share", 0)
    extra += ("--aspect_ratio_buckets", "32,32;24,40;40,24", "--cache_latents")
    adapt(workspace, "buckets", *extra, "--checkpointing_steps", 1)
    checkpoint = ("--resume_from_checkpoint", workspace / "buckets" / "checkpoint-1")  # within the first stage
    adapt(workspace, "buckets-resumed", *extra, *checkpoint)
    expected = unet_weights(workspace / "buckets")
    resumed = unet_weights(workspace / "buckets-resumed")
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())


def test_codes_of_a_kl_autoencoder_s_latents_are_cached_and_teach_nearly_the_same(workspace):
    vae = AutoencoderKL.from_pretrained(workspace / "kl")
    pictures = [PIL.Image.open(path) for path in sorted((workspace / "data" / "train").glob("*.png"))]
    product_quantize(vae, pictures, num_subspaces=2, codebook_size=256).save_pretrained(workspace / "kl-codes")
    cache = ("--train_data_dir", workspace / "data", "--min_image_side", 1, "--output_dir", workspace / "packed")
    run("encode_dataset.py", "--vae_name_or_path", workspace / "kl-codes", *cache, "--resolution", 32)
    extra = ("--center_crop", "--num_statistics_images", 0)
    settings = {
        "of-codes": ("--vae_name_or_path", workspace / "kl-codes"),
        "of-cache": ("--vae_name_or_path", workspace / "kl-codes", "--latents_dir", workspace / "packed"),
    }
    weights = {}
    for name, flags in settings.items():
        adapt(workspace, name, *flags, *extra, stages="32:3:1e-3:all")
        weights[name] = unet_weights(workspace / name)
    assert all(torch.equal(value, weights["of-codes"][name]) for name, value in weights["of-cache"].items())
    model = QuantizedAutoencoder.from_pretrained(workspace / "kl-codes")
    image = to_tensor(pictures[0])[None, :, :32, :32]
    latents = vae.encode(image).latent_dist.mode()
    error = (model.quantize(latents).latents - latents).square().mean() / latents.var()
    assert error < 0.1, "what the denoiser learns from is near the latents"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cache_latents": True, "streaming": True}, "--cache_latents keeps all .* leave out --streaming"),
        ({"cache_latents": True, "latents_dir": "codes"}, "--cache_latents keeps all .* leave out --latents_dir"),
        ({"aspect_ratio_buckets": "auto", "streaming": True}, "each picture: leave out --streaming"),
        ({"aspect_ratio_buckets": "auto", "resize_mode": "stretch"}, "own way: leave out --resize_mode stretch"),
        ({"aspect_ratio_buckets": "512x512"}, '--aspect_ratio_buckets: must be "auto" or "HEIGHT,WIDTH;...": Invalid'),
    ],
)
def test_contradictions_of_caches_and_buckets_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        AdaptationOptions.of({"pretrained_model_name_or_path": "sd", "train_data_dir": "data"} | flags)


def test_codes_of_another_model_or_resolution_are_refused(workspace):
    cache = ("--train_data_dir", workspace / "data", "--output_dir", workspace / "other-codes", "--resolution", 32)
    run("encode_dataset.py", "--vae_name_or_path", workspace / "pq", *cache)
    PQModel(**tiny_config()).save_pretrained(workspace / "other-pq")
    extra = ("--latents_dir", workspace / "other-codes", "--vae_name_or_path", workspace / "other-pq")
    with pytest.raises(subprocess.CalledProcessError) as error:
        adapt(workspace, "bad", *extra, stages="32:1:1e-3:all")
    assert "holds other codes: model_sha256 is" in error.value.stdout
    with pytest.raises(subprocess.CalledProcessError) as error:
        adapt(workspace, "bad", *extra)
    assert "has no codes at 40 px" in error.value.stdout
    (workspace / "other-codes" / "32" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="has 0 of 1 shards"):
        load_cached_codes(workspace / "other-codes", 32, PQModel.from_pretrained(workspace / "pq"), None)


@pytest.mark.parametrize("size", [2, 16, 100, 512])
def test_packed_codes_take_whole_bits_and_come_back(size):
    codes = torch.randint(size, (4, 3, 5), generator=torch.Generator().manual_seed(0))
    codes.view(-1)[0] = size - 1
    packed = pack_codes(codes, size)
    assert len(packed) == -(-60 * math.ceil(math.log2(size)) // 8)
    assert torch.equal(unpack_codes(packed, (4, 3, 5), size), codes)


def test_prompts_of_the_validation_are_captions_of_the_data_unless_given(workspace):
    given = {"pretrained_model_name_or_path": "sd", "train_data_dir": str(workspace / "data")}
    one, own, none = (
        AdaptationOptions.of(given | more) for more in ({}, {"validation_prompts": ["a wall"]}, {"report_to": "none"})
    )
    accelerator = Accelerator(cpu=True)
    assert _validation_prompts(one, accelerator) == ["A red wall", "A green wall", "A blue wall"]
    assert _validation_prompts(own, accelerator) == ["a wall"] and _validation_prompts(none, accelerator) == []


def test_a_dry_run_counts_the_parts(workspace):
    result = adapt(workspace, "dry", "--vae_name_or_path", workspace / "pq", "--dry_run", "--num_train_epochs", "4")
    assert "text_encoder: " in result.stdout and "hours for 18 steps" in result.stdout  # 9 pictures, 2 in each step
    assert not (workspace / "dry").exists()


@pytest.mark.parametrize(
    "extra, message",
    [
        (("--stages", "32:2:1e-2"), "a stage is RESOLUTION:STEPS:LEARNING_RATE:conv or ...:all"),
        (("--stages", "30:2:1e-2:all"), "30 must be a multiple of the downsampling factor F = 4"),
        (("--lora_rank", "2", "--unet_init", "random"), "keeps neither a --train_text_encoder nor a UNet of"),
        (("--lora_rank", "2", "--guidance_scale", "2"), "--guidance_scale cannot be saved with the adapter"),
        (("--num_train_epochs", "1", "--streaming"), "--num_train_epochs: a stream does not say how long it is"),
        (("--variant", "fp16"), "no such modeling files are available"),
        (("--caption_column", "caption"), "no column 'caption'; the dataset has image, text"),
    ],
)
def test_bad_arguments_are_named(workspace, extra, message):
    with pytest.raises(subprocess.CalledProcessError) as error:
        adapt(workspace, "bad", "--vae_name_or_path", workspace / "pq", *extra)
    assert message in error.value.stdout


def test_a_resumed_run_takes_new_stages_and_refuses_code_in_its_checkpoint(workspace, tmp_path):
    def adapt_on(*extra, stages):
        given = ["--pretrained_model_name_or_path", workspace / "sd", "--vae_name_or_path", workspace / "pq"]
        given += ["--train_data_dir", workspace / "data", "--cache_dir", workspace / "cache", "--stages", stages]
        given += ["--train_batch_size", 2, "--num_statistics_images", 6, "--output_dir", tmp_path / "run"]
        given += ["--use_ema", "--checkpointing_steps", 1, "--report_to", "none", *extra]
        adapt_stable_diffusion(AdaptationOptions.of(parse(AdaptationOptions, list(map(str, given)))))

    adapt_on(stages="32:1:1e-2:all")
    adapt_on("--resume_from_checkpoint", "latest", stages="32:1:0:all 32:2:1e-3:all")
    checkpoint = tmp_path / "run" / "checkpoint-3"
    (group,) = torch.load(checkpoint / "optimizer.bin", weights_only=True)["param_groups"]
    assert group["lr"] == pytest.approx(1e-3)
    assert (
        "- until step 1 `--max_train_steps 1`, `--stages 32:1:0.01:all`"
        in (tmp_path / "run" / "README.md").read_text()
    )
    poison(checkpoint, "optimizer.bin", tmp_path / "mark")
    with pytest.raises(ValueError, match="optimizer.bin is not read"):
        adapt_on("--resume_from_checkpoint", "latest", stages="32:1:0:all 32:3:1e-3:all")
    assert not (tmp_path / "mark").exists()


def test_stages_follow_each_other():
    stages = [Stage.parse(text) for text in ("384:20:8e-5:conv", "768:80:8e-5:all", "768:20:2e-5:all")]
    assert stages[0] == Stage(384, 20, 8e-5, "conv")
    found = [find_stage(stages, step) for step in (0, 19, 20, 99, 100, 500)]
    assert [stages.index(stage) for stage in found] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("kind", ["pq", "kl"])
def test_a_denoiser_sees_latents_of_variance_one(kind, workspace):
    vae = (PQModel if kind == "pq" else AutoencoderKL).from_pretrained(workspace / kind)
    torch.manual_seed(0)
    batches = [torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(3)]
    latents = [encode_latents(vae, batch) for batch in batches]
    set_latent_statistics(vae, latents)
    latents = scale_latents(vae, torch.cat(latents)).double()
    if kind == "pq":
        deviations = latents.transpose(0, 1).flatten(1).std(1, correction=0)
        torch.testing.assert_close(deviations, torch.ones(8).double(), atol=1e-4, rtol=0)
        assert latents.mean((0, 2, 3)).abs().max() < 1e-5
    else:
        assert float(latents.std()) == pytest.approx(1, abs=0.05)


def test_channels_weigh_by_what_they_change_in_the_picture():
    vae = PQModel(**tiny_config(latents_mean=[0.0] * 8, latents_std=[0.5] * 4 + [1.5] * 4))
    assert channel_weights(vae, 0) is None
    assert channel_weights(AutoencoderKL(norm_num_groups=4, block_out_channels=(8,)), 1) is None
    weights = channel_weights(vae, 1)
    torch.testing.assert_close(weights, torch.tensor([0.5] * 4 + [1.5] * 4))
    torch.testing.assert_close(channel_weights(vae, 2)[4:], 9 * channel_weights(vae, 2)[:4])

    def loss(channel, weights):
        """Of a denoiser that is right but for one channel, where it is off by 1."""
        scheduler, latents = DDPMScheduler(), torch.zeros(2, 8, 4, 4)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        off = torch.nn.functional.one_hot(torch.tensor(channel), 8).view(1, 8, 1, 1)
        generator = torch.Generator().manual_seed(0)
        return denoising_loss(
            lambda *_: noise + off, scheduler, latents, None, channel_weights=weights, generator=generator
        )

    torch.testing.assert_close(loss(7, weights), torch.full((2,), 1.5 / 8))
    torch.testing.assert_close(loss(0, weights), torch.full((2,), 0.5 / 8))
    torch.testing.assert_close(loss(0, None), torch.full((2,), 1 / 8))
