"""Trains and resumes small masked transformers with the real script on real files."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_config
from hub_stand_in import Hub
from labelled_pictures import write_labelled_pictures
from safetensors.torch import load_file
from scripts import run_script
from transformers import CLIPTextConfig, CLIPTextModel
from whole_runs import check_whole_run, weights

from diffusers_pq import MaskedPQPipeline, PQMaskedTransformer, PQModel
from diffusers_pq.hub.push import check_folder
from diffusers_pq.training.masked import MaskedOptions, create_masked_transformer
from diffusers_pq.training.stable_diffusion import train_clip_tokenizer


ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "training_scripts"
TRANSFORMER = {"_class_name": "PQMaskedTransformer", "code_embed_dim": 8, "num_layers": 1}
TRANSFORMER |= {"num_attention_heads": 2, "attention_head_dim": 8}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Pictures of three classes with captions, an autoencoder, a text encoder, and a transformer's config."""
    folder = tmp_path_factory.mktemp("masked")
    write_labelled_pictures(folder / "data")
    (folder / "names.txt").write_text("blue\ngreen\nred\n")
    torch.manual_seed(0)
    PQModel(**tiny_config()).save_pretrained(folder / "pq")
    (folder / "transformer.json").write_text(json.dumps(TRANSFORMER))
    tokenizer = train_clip_tokenizer(["a red wall", "a blue wall", "a green wall"], 530, 8)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=8, **sizes)
    CLIPTextModel(config).save_pretrained(folder / "text" / "text_encoder")
    tokenizer.save_pretrained(folder / "text" / "tokenizer")
    run_script(
        SCRIPTS / "encode_dataset.py", "--vae_name_or_path", folder / "pq", "--train_data_dir", folder / "data",
        "--min_image_side", 1, "--output_dir", folder / "codes", "--label_column", "category", "--resolution", 32,
    )  # fmt: skip
    return folder


def arguments(workspace, output):
    given = ["--vae_name_or_path", workspace / "pq", "--train_data_dir", workspace / "data"]
    given += ["--model_config_name_or_path", workspace / "transformer.json", "--label_column", "category"]
    given += ["--cache_dir", workspace / "cache", "--resolution", 32, "--min_image_side", 1]
    given += ["--train_batch_size", 2, "--max_train_steps", 3, "--report_to", "none"]
    return [*map(str, given), "--learning_rate", "1e-2", "--output_dir", str(workspace / output)]


def train(workspace, output, *extra):
    return run_script(SCRIPTS / "train_masked.py", *arguments(workspace, output), *extra)


def failure(workspace, *extra):
    with pytest.raises(subprocess.CalledProcessError) as error:
        train(workspace, "bad", *extra)
    return error.value.stdout


def test_trains_on_a_stream_of_pictures_resumes_exactly_and_paints_by_name(workspace):
    extra = ("--report_to", "tensorboard")
    pipeline = check_whole_run(train, workspace, MaskedPQPipeline, "transformer", "class_labels=0", *extra)
    assert pipeline.transformer.config.num_classes == 3 and pipeline.transformer.config.sample_size == 8


def test_packed_codes_teach_what_their_pictures_do(workspace):
    train(workspace, "pictures", "--center_crop")
    train(workspace, "cached", "--center_crop", "--latents_dir", workspace / "codes")
    train(workspace, "remembered", "--center_crop", "--cache_latents")
    expected = weights(workspace / "pictures", "transformer")
    for output in ("cached", "remembered"):
        assert all(
            torch.equal(value, expected[name]) for name, value in weights(workspace / output, "transformer").items()
        )


def test_captions_condition_it_and_an_untrained_text_encoder_learns_along(workspace):
    extra = ("--caption_column", "text", "--text_encoder_name_or_path", workspace / "text", "--train_text_encoder")
    train(workspace, "texts", *extra, "--validation_prompts", "a red wall", "--validation_steps", 2)
    pipeline = MaskedPQPipeline.from_pretrained(workspace / "texts")
    assert pipeline("a red wall", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    assert 'pipeline("A photograph.", ' in (workspace / "texts" / "README.md").read_text()
    start, trained = (load_file(workspace / run / "text_encoder" / "model.safetensors") for run in ("text", "texts"))
    assert any(not torch.equal(value, start[name]) for name, value in trained.items())


def test_two_processes_train_together(workspace):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += [SCRIPTS / "train_masked.py", *arguments(workspace, "both"), "--max_train_steps", "1"]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    assert MaskedPQPipeline.from_pretrained(workspace / "both").get_label_ids("green") == [1]


def test_best_and_last_model_are_pushed(workspace, tmp_path):
    hub = Hub()
    command = [sys.executable, SCRIPTS / "train_masked.py", *arguments(workspace, "pushed"), "--validation_steps", "1"]
    command += ["--max_train_steps", "1", "--push_to_hub", "--hub_model_id", "org/masked", "--hub_token", "hf_owner"]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(command, env=environment, check=True, timeout=300)
    files = hub.files("org/masked")
    hub.close()
    name = "transformer/diffusion_pytorch_model.safetensors"
    for path in ("model_index.json", "README.md", name, f"best/{name}", "transformer/diffusers_pq.py"):
        assert files[path] == (workspace / "pushed" / path).read_bytes()
    check_folder(workspace / "pushed")


def test_codes_of_another_model_are_refused_by_their_sizes(workspace):
    PQModel(**tiny_config(num_subspaces=2, codebook_size=8)).save_pretrained(workspace / "other-pq")
    message = failure(workspace, "--latents_dir", workspace / "codes", "--vae_name_or_path", workspace / "other-pq")
    assert "holds other codes: num_subspaces is 4, not 2, codebook_size is 16, not 8, model_sha256 is" in message
    message = failure(workspace, "--latents_dir", workspace / "codes", "--resolution", 40)
    assert "has no codes at 40 px" in message


@pytest.mark.parametrize(
    "extra, message",
    [
        (("--resolution", 30), "--resolution: 30 must be a multiple of the downsampling factor F = 4"),
        (("--label_column", "class"), "no column 'class'; the dataset has image, category, number, text"),
        (("--validation_labels", "yellow"), "unknown class 'yellow'; known names are blue, green, red"),
        (("--validation_labels", 3), "`class_labels` must be in 0 ... 2, but one is 3"),
        (("--class_names_file", "FOLDER/two.txt"), "class 'red' in the column 'category', which is none of the 2"),
    ],
)
def test_bad_arguments_are_named(workspace, extra, message):
    (workspace / "two.txt").write_text("blue\ngreen\n")
    extra = [str(part).replace("FOLDER", str(workspace)) for part in extra]
    script = runpy.run_path(str(SCRIPTS / "train_masked.py"))
    args = script["parse_args"]([*arguments(workspace, "bad"), *extra])
    with pytest.raises(ValueError, match=re.escape(message)):
        script["main"](args)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"caption_column": "text"}, "--caption_column and --text_encoder_name_or_path go together"),
        ({"text_encoder_name_or_path": "t"}, "--caption_column and --text_encoder_name_or_path go together"),
        ({"train_text_encoder": True}, "--train_text_encoder needs --text_encoder_name_or_path"),
        ({"validation_prompts": ["a"]}, "--validation_prompts need --caption_column"),
        ({"label_smoothing": 1.0}, "--label_smoothing: must be at least 0 and below 1, but is 1.0"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        MaskedOptions.of({"vae_name_or_path": "v", "model_config_name_or_path": "m"} | given)


def test_a_config_that_contradicts_the_codes_or_classes_is_refused():
    vae = PQModel(**tiny_config())
    transformer = create_masked_transformer(TRANSFORMER, vae, 8, num_classes=3)
    assert isinstance(transformer, PQMaskedTransformer) and transformer.config.num_subspaces == 4
    with pytest.raises(ValueError, match="`codebook_size` is 32 in the transformer's config, but .* ask for 16"):
        create_masked_transformer(TRANSFORMER | {"codebook_size": 32}, vae, 8, num_classes=3)
    with pytest.raises(ValueError, match="`num_classes` is 3 .* ask for None"):
        create_masked_transformer(TRANSFORMER | {"num_classes": 3}, vae, 8, cross_attention_dim=16)
    with pytest.raises(ValueError, match="must name the `_class_name` PQMaskedTransformer, not 'UNet2DModel'"):
        create_masked_transformer({"_class_name": "UNet2DModel"}, vae, 8, num_classes=3)


def test_embeddings_start_from_the_codebooks_unless_told_otherwise(workspace):
    expected = PQMaskedTransformer(4, 16, 8, 8, 1, 2, 8, num_classes=3)
    expected.init_code_embeddings(
        PQModel.from_pretrained(workspace / "pq").quantizer, torch.Generator().manual_seed(0)
    )
    for init in ("codebooks", "random"):
        train(workspace, init, "--code_embedding_init", init, "--learning_rate", 0, "--max_train_steps", 1)
        table = weights(workspace / init, "transformer")["code_embeddings"]
        assert torch.equal(table, expected.code_embeddings) == (init == "codebooks")


def test_a_dry_run_of_a_recipe_counts_the_parts_and_writes_nothing(workspace):
    given = ["--config", SCRIPTS / "recipes" / "masked-f16.yaml", "--vae_name_or_path", workspace / "pq"]
    given += ["--model_config_name_or_path", workspace / "transformer.json", "--dataset_name", workspace / "data"]
    given += ["--label_column", "category", "--cache_dir", workspace / "cache", "--resolution", 32, "--no-streaming"]
    given += ["--dataloader_num_workers", 0, "--total_batch_size", 2, "--num_train_epochs", 4]
    result = run_script(SCRIPTS / "train_masked.py", *given, "--output_dir", workspace / "dry", "--dry_run")
    assert "transformer: " in result.stdout and "hours for 18 steps" in result.stdout
    assert not (workspace / "dry").exists()


def test_the_recipe_for_imagenet_trains_400_million_parameters():
    flags = yaml.safe_load((SCRIPTS / "recipes" / "masked-f16.yaml").read_text())
    config = json.loads((ROOT / flags["model_config_name_or_path"]).read_text())
    with torch.device("meta"):
        vae = PQModel.from_config(PQModel.load_config(ROOT / "model_cards" / "pqgan-f16"))
        transformer = create_masked_transformer(config, vae, 256 // vae.downsampling_factor, num_classes=1000)
    assert transformer.num_parameters() / 1e6 == pytest.approx(400, rel=0.05)
