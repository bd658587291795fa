import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import tiny_config, tiny_unet
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from safetensors.torch import load_file, save_file
from test_metrics import tiny_metrics
from torchmetrics import MetricCollection

from diffusers_pq import PQModel
from diffusers_pq.autoencoders import downsampling_factor
from diffusers_pq.evaluation import reconstruction
from diffusers_pq.evaluation.data import EvaluationData, data_flags
from diffusers_pq.evaluation.options import parse_reconstruction_args
from diffusers_pq.evaluation.progress import EvaluationProgress, check_settings
from diffusers_pq.evaluation.reconstruction import describe_latents, evaluate_autoencoder, run_evaluation
from diffusers_pq.evaluation.systems import load_for_evaluation
from diffusers_pq.evaluation.tables import read_results, results_table, write_table
from diffusers_pq.images import to_uint8
from diffusers_pq.metrics import METRICS, CodebookUsage, load_metrics, psnr, ssim
from diffusers_pq.reconstruction import reconstruct, reconstruct_picture


SCRIPT = Path(__file__).parents[2] / "training_scripts" / "evaluate_reconstruction.py"
CLASSES = {
    "PQModel": PQModel,
    "VQModel": VQModel,
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
    "AutoencoderDC": AutoencoderDC,
}
# Nothing needs downloading for these.
LOCAL_METRICS = ["psnr", "psnr_pooled", "ssim"]


def tiny_model(name):
    """An autoencoder of F = 4 with random weights."""
    torch.manual_seed(0)
    if name == "PQModel":
        return PQModel(**tiny_config()).eval()
    if name == "AutoencoderTiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        ).eval()
    if name == "AutoencoderDC":
        return AutoencoderDC(
            latent_channels=8,
            attention_head_dim=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            upsample_block_type="interpolate",
        ).eval()
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
        "norm_num_groups": 4,
    }
    if name == "VQModel":
        return VQModel(**blocks, num_vq_embeddings=20, latent_channels=5).eval()
    return AutoencoderKL(**blocks, latent_channels=5).eval()


@pytest.fixture
def photographs(tmp_path):
    """Seven pictures of different sizes; the green of the middle of each is ten times its index."""
    folder = tmp_path / "photographs" / "validation"
    folder.mkdir(parents=True)
    for index in range(7):
        noise = np.random.default_rng(index).integers(0, 256, (40 + index, 50, 3), dtype=np.uint8)
        noise[..., 1] = 10 * index
        PIL.Image.fromarray(noise).save(folder / f"{index}.png")
    return EvaluationData(data_dir=str(folder.parent), resolution=32)


@pytest.fixture
def shards(tmp_path):
    """Eleven pictures in four parquet files; all green of each is ten times its index."""
    folder = tmp_path / "shards"
    folder.mkdir()
    pictures = [PIL.Image.new("RGB", (32, 32), (0, 10 * index, 0)) for index in range(11)]
    dataset = datasets.Dataset.from_dict({"image": pictures}).cast_column("image", datasets.Image())
    for index in range(4):
        dataset.shard(4, index, contiguous=True).to_parquet(folder / f"validation-{index:05}-of-00004.parquet")
    return EvaluationData(dataset_name=str(folder), resolution=32)


def indices(loader):
    """The pictures that a loader gives, by their green."""
    return [round(float(picture[1, 16, 16] + 1) * 12.75) for batch in loader for picture in batch]


def test_pictures_are_made_square_by_a_crop_or_stretched(tmp_path):
    folder = tmp_path / "stripes" / "validation"
    folder.mkdir(parents=True)
    stripes = np.zeros((32, 64, 3), np.uint8)
    stripes[:, :16] = 255  # a quarter, which a centre crop leaves out
    PIL.Image.fromarray(stripes).save(folder / "stripes.png")
    shares = {}
    for mode in ("short_side", "stretch"):
        data = EvaluationData(data_dir=str(folder.parent), resolution=32, resize_mode=mode)
        (picture,) = next(iter(data.loader(batch_size=1)))
        assert picture.shape == (3, 32, 32)
        shares[mode] = float((picture > 0).double().mean())
    assert shares == {"short_side": 0, "stretch": 0.25}
    with pytest.raises(ValueError, match="`--resize_mode` must be one of short_side, stretch, but is 'pad'"):
        EvaluationData(data_dir=str(folder.parent), resize_mode="pad")


def test_evaluations_of_stretched_pictures_have_a_folder_and_a_table_of_their_own(photographs, tmp_path):
    tiny_model("AutoencoderKL").save_pretrained(tmp_path / "kl")
    for data in (photographs, replace(photographs, resize_mode="stretch")):
        run_evaluation(Accelerator(cpu=True), str(tmp_path / "kl"), data, tmp_path / "out", metrics=["psnr"])
    assert (tmp_path / "out" / "kl" / "photographs-validation-32-stretch" / "results.json").is_file()
    table = write_table(tmp_path / "out")
    assert "32 x 32, 7 pictures" in table and "32 x 32, stretched, 7 pictures" in table


@pytest.mark.parametrize("name", CLASSES)
def test_reconstructs_with_every_autoencoder(name, images, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / name)
    model = load_for_evaluation(str(tmp_path / name))
    output = reconstruct(model, images)
    assert type(model) is CLASSES[name] and not model.training
    assert output.sample.shape == images.shape and output.latents.shape[-2:] == (8, 12)
    with torch.no_grad():
        expected = model(images).sample
    # The forward of AutoencoderTiny stores its latents in 8 bits.
    torch.testing.assert_close(output.sample, expected, atol=0.1 if name == "AutoencoderTiny" else 1e-5, rtol=0)


@pytest.mark.parametrize("name", CLASSES)
def test_reconstructs_a_picture_of_any_size_with_every_autoencoder(name):
    model = tiny_model(name)
    assert downsampling_factor(model) == 4
    result = reconstruct_picture(model, PIL.Image.linear_gradient("L").convert("RGB").resize((45, 31)))
    # d = 8 or 5 values of 16 bits, or S = 4 codes of 4 bits, or one of 5, for each of 12 x 8 latent pixels
    bits = {"PQModel": 16, "VQModel": 5, "AutoencoderKL": 80, "AutoencoderTiny": 64, "AutoencoderDC": 128}[name]
    assert result.picture.size == (45, 31) and result.scores["bits_per_pixel"] == bits * 12 * 8 / (45 * 31)
    assert ("H_n" in result.scores) == (name in ("PQModel", "VQModel"))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 40), (6, 6)])
def test_the_smallest_pictures_are_reconstructed(size):
    picture = PIL.Image.new("L", size, 100)
    result = reconstruct_picture(tiny_model("PQModel"), picture)
    assert result.picture.size == size and ("ssim" in result.scores) == (min(size) >= 6)


@pytest.mark.parametrize("name", ["PQModel", "AutoencoderKL", "VQModel"])
def test_a_large_picture_is_taken_in_tiles(name, monkeypatch):
    model = tiny_model(name)
    largest = 0

    def look(module, inputs):
        nonlocal largest
        largest = max(largest, inputs[0].shape[-2] * inputs[0].shape[-1])

    model.encoder.register_forward_pre_hook(look)
    picture = PIL.Image.linear_gradient("L").resize((100, 64))
    whole = reconstruct_picture(model, picture).picture
    assert largest == 100 * 64
    monkeypatch.setattr("diffusers_pq.models.tiling.WHOLE_PIXELS", 5000)
    largest = 0
    tiled = reconstruct_picture(model, picture).picture
    assert tiled.size == whole.size and (largest < 100 * 64) == (name != "VQModel")
    assert not getattr(model, "use_tiling", False)


def test_the_codes_of_a_vqmodel_are_those_it_decodes(images):
    model = tiny_model("VQModel")
    codes = reconstruct(model, images).codes
    assert codes.shape == (2, 1, 8, 12)
    with torch.no_grad():
        quantized = model.quantize(model.encode(images).latents)[0]
    looked_up = model.quantize.embedding(codes[:, 0]).permute(0, 3, 1, 2)
    torch.testing.assert_close(looked_up, quantized, atol=1e-6, rtol=0)


def test_latents_are_described():
    pq = {"downsampling_factor": 4, "latent_channels": 8, "bits_per_pixel": 1.0, "num_subspaces": 4}
    assert describe_latents(tiny_model("PQModel"), 32) == pq | {"codebook_size": 16}
    kl = {"downsampling_factor": 4, "latent_channels": 5, "bits_per_pixel": 5.0}
    assert describe_latents(tiny_model("AutoencoderKL"), 32) == kl
    vq = {"downsampling_factor": 4, "latent_channels": 5, "bits_per_pixel": 5 / 16, "num_subspaces": 1}
    assert describe_latents(tiny_model("VQModel"), 32) == vq | {"codebook_size": 20}


def test_a_side_the_model_cannot_reconstruct_is_refused():
    with pytest.raises(ValueError, match="--resolution 30.*multiple of its downsampling factor"):
        describe_latents(tiny_model("AutoencoderKL"), 30)


def test_a_resolution_that_does_not_suit_is_refused_before_the_metrics_are_fetched(tmp_path, monkeypatch):
    tiny_model("PQModel").save_pretrained(tmp_path / "pq")
    PIL.Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    monkeypatch.setattr(reconstruction, "load_metrics", lambda *args: pytest.fail("the metrics were fetched before"))
    data = EvaluationData(data_dir=str(tmp_path), split="train", resolution=30)
    with pytest.raises(ValueError, match="`--resolution 30` does not suit the model: .* F = 4, but are 30 x 30"):
        run_evaluation(Accelerator(cpu=True), str(tmp_path / "pq"), data, tmp_path / "out")


def test_what_is_no_autoencoder_is_refused(tmp_path):
    tiny_unet(4).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="holds UNet2DConditionModel, which is not an autoencoder of diffusers"):
        load_for_evaluation(str(tmp_path / "unet"))


def test_an_autoencoder_without_all_its_weights_is_refused(tmp_path):
    tiny_model("VQModel").save_pretrained(tmp_path / "vq")
    weights = load_file(tmp_path / "vq" / "diffusion_pytorch_model.safetensors")
    del weights["quant_conv.bias"]
    save_file(weights, tmp_path / "vq" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="weights of .*vq lack .*quant_conv.bias"):
        load_for_evaluation(str(tmp_path / "vq"))


def test_pictures_are_centre_crops_after_the_short_side_was_resized(photographs):
    (batch,) = photographs.loader(batch_size=7)
    assert batch.shape == (7, 3, 32, 32)
    with PIL.Image.open(Path(photographs.data_dir, "validation", "4.png")) as picture:
        height, width = 32, 32 * 50 // 44
        resized = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((2, 0, 34, 32)))
    np.testing.assert_array_equal(to_uint8(batch[4]).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_picture_is_seen_once(shards, num_processes, num_workers, streaming, tmp_path):
    seen = []
    for index in range(num_processes):
        share = {"process_index": index, "num_processes": num_processes}
        seen += indices(shards.loader(2, num_workers, streaming, str(tmp_path / "cache"), **share))
    assert sorted(seen) == list(range(11))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_first_pictures_are_the_same_for_any_number_of_processes(shards, streaming, tmp_path):
    first = replace(shards, max_samples=5)
    seen = []
    for index in range(2):
        seen += indices(first.loader(2, 2, streaming, str(tmp_path / "cache"), process_index=index, num_processes=2))
    assert sorted(seen) == list(range(5))
    assert len(indices(replace(shards, max_samples=99).loader(2, 0, streaming, str(tmp_path / "cache")))) == 11


def test_a_damaged_picture_is_named(photographs):
    path = Path(photographs.data_dir, "validation", "3.png")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"3\.png cannot be read"):
        list(photographs.loader(batch_size=2))


def test_bad_data_arguments_are_named(shards, photographs, tmp_path):
    for sources in ({}, {"dataset_name": "a", "data_dir": "b"}):
        with pytest.raises(ValueError, match="exactly one of `--dataset_name` and `--data_dir`"):
            EvaluationData(**sources)
    for data, message in [
        (replace(shards, image_column="picture"), "no column 'picture'; the dataset has image"),
        (replace(photographs, split="test"), "`--split` is 'test', but photographs has no such split"),
    ]:
        with pytest.raises(ValueError, match=message):
            data.loader(2, cache_dir=str(tmp_path / "cache"))


def test_scores_are_those_of_single_pictures(photographs):
    model = tiny_model("PQModel")
    metrics, _ = load_metrics(LOCAL_METRICS)
    scores, pictures = evaluate_autoencoder(Accelerator(cpu=True), model, photographs.loader(3), metrics)
    (images,) = photographs.loader(7)
    usage = CodebookUsage(4, 16)
    output = reconstruct(model, images)
    usage.update(output.codes)
    pair = to_uint8(output.sample), to_uint8(images)
    expected = {"psnr": float(psnr(*pair).mean()), "ssim": float(ssim(*pair).mean())} | usage.compute()
    error = (output.sample.clamp(-1, 1) - images).square().mean()
    expected["psnr_pooled"] = float(10 * torch.log10(4 / error))
    # Convolutions of other batch sizes round differently, which moves single pixels by a level.
    assert pictures == 7 and scores == pytest.approx(expected, rel=1e-4)


class Killed(Exception):
    pass


class KilledAfter:
    """An autoencoder that dies after some batches, and counts the pictures it saw."""

    def __init__(self, model, batches):
        self.model, self.batches, self.pictures = model, batches, 0
        self.handle = model.encoder.register_forward_pre_hook(self.count)

    def count(self, module, inputs):
        if self.batches == 0:
            raise Killed
        self.batches -= 1
        self.pictures += len(inputs[0])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stopped_evaluation_goes_on_where_it_last_saved(shards, streaming, tmp_path):
    model, accelerator = tiny_model("PQModel"), Accelerator(cpu=True)

    def evaluate(progress):
        loader = shards.loader(2, streaming=streaming, cache_dir=str(tmp_path / "cache"))
        return evaluate_autoencoder(accelerator, model, loader, tiny_metrics(), progress, checkpointing_steps=2)

    whole = evaluate(None)
    progress = EvaluationProgress(tmp_path, 0, {"seed": 0})
    killed = KilledAfter(model, batches=3)
    with pytest.raises(Killed):
        evaluate(progress)
    assert killed.pictures == 6
    killed.batches, killed.pictures = 99, 0
    scores, pictures = evaluate(progress)
    assert killed.pictures == 11 - 4 and pictures == whole[1] == 11
    assert scores.keys() > {"psnr", "rfid", "cmmd", "H_n"} and scores == pytest.approx(whole[0], rel=1e-9)


def test_the_former_name_of_a_resize_mode_still_works(tmp_path):
    assert EvaluationData(data_dir="pictures", resize_mode="crop").resize_mode == "short_side"
    args = parse_reconstruction_args(
        ["--pretrained_model_name_or_path", "a", "--data_dir", "b", "--resize_mode", "crop"]
    )
    assert args.resize_mode == "short_side"
    check_settings({"resize_mode": "crop"}, {"resize_mode": "short_side"}, tmp_path)


def test_an_evaluation_with_other_settings_is_not_gone_on_with(tmp_path):
    metrics, _ = load_metrics(LOCAL_METRICS)
    EvaluationProgress(tmp_path, 0, {"batch_size": 2, "split": "test"}).save(metrics, batches=1, pictures=2)
    with pytest.raises(ValueError, match=r"other settings \(batch_size 2 there, 3 now\)"):
        EvaluationProgress(tmp_path, 0, {"batch_size": 3, "split": "test"}).restore(metrics)
    # Of a version that knew no `resize_mode`, and cropped
    check_settings({"split": "test"}, {"split": "test", "resize_mode": "short_side"}, tmp_path)
    with pytest.raises(ValueError, match="resize_mode 'short_side' there, 'stretch' now"):
        check_settings({"split": "test"}, {"split": "test", "resize_mode": "stretch"}, tmp_path)


def test_a_state_is_restored_to_the_device_of_the_metrics(tmp_path):
    metrics = MetricCollection({"codebooks": CodebookUsage(2, 4)})
    progress = EvaluationProgress(tmp_path, 0, {})
    progress.save(metrics, batches=1, pictures=2)
    # A device that refuses tensors of the CPU, as a GPU does.
    metrics.to("meta")
    assert progress.restore(metrics) == (1, 2) and metrics["codebooks"].counts.is_meta


def test_finished_evaluations_are_read_and_not_repeated(photographs, tmp_path):
    tiny_model("AutoencoderKL").save_pretrained(tmp_path / "kl")
    arguments = {"output_dir": tmp_path / "out", "metrics": LOCAL_METRICS}
    result = run_evaluation(Accelerator(cpu=True), str(tmp_path / "kl"), photographs, **arguments)
    folder = tmp_path / "out" / "kl" / "photographs-validation-32"
    assert {path.name for path in folder.iterdir()} == {"results.json", "model-index.yml"}
    marked = result | {"date": "long ago"}
    (folder / "results.json").write_text(json.dumps(marked))
    assert run_evaluation(Accelerator(cpu=True), str(tmp_path / "kl"), photographs, **arguments) == marked
    tiny_model("PQModel").save_pretrained(tmp_path / "other" / "kl")
    with pytest.raises(ValueError, match="weights_sha256"):
        run_evaluation(Accelerator(cpu=True), str(tmp_path / "other" / "kl"), photographs, **arguments)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", ["photographs", "shards"])
def test_scores_of_other_pictures_under_the_same_name_are_not_given_out(source, streaming, request, tmp_path):
    data = request.getfixturevalue(source)
    tiny_model("AutoencoderKL").save_pretrained(tmp_path / "kl")
    arguments = {"output_dir": tmp_path / "out", "metrics": ("psnr",), "cache_dir": str(tmp_path / "cache")}

    def evaluate():
        return run_evaluation(Accelerator(cpu=True), str(tmp_path / "kl"), data, streaming=streaming, **arguments)

    assert evaluate() == evaluate()
    file = sorted(path for path in Path(data.dataset_name or data.data_dir).rglob("*.*") if path.is_file())[0]
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).slice(1), file)
    else:
        PIL.Image.new("RGB", (40, 40)).save(file)
    with pytest.raises(ValueError, match="an evaluation of other pictures"):
        evaluate()


def test_two_processes_of_the_script_give_the_table_of_one(photographs, tmp_path):
    tiny_model("PQModel").save_pretrained(tmp_path / "model")

    def flags(output):
        values = {
            "pretrained_model_name_or_path": tmp_path / "model",
            "data_dir": photographs.data_dir,
            "resolution": 32,
            "batch_size": 2,
            "dataloader_num_workers": 0,
            "output_dir": tmp_path / output,
            "cache_dir": tmp_path / "cache",
        }
        given = [part for flag, value in values.items() for part in (f"--{flag}", str(value))]
        return [*given, "--metrics", *LOCAL_METRICS]

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run([*launch, *flags("two")], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    script = runpy.run_path(str(SCRIPT))
    script["main"](script["parse_args"](flags("one")))
    (shared,), (alone,) = read_results(tmp_path / "two"), read_results(tmp_path / "one")
    assert shared["machine"].startswith("2 x ") and shared["pictures"] == alone["pictures"] == 7
    assert shared["scores"] == pytest.approx(alone["scores"], rel=1e-6)
    table = (tmp_path / "two" / "results.md").read_text()
    assert table == (tmp_path / "one" / "results.md").read_text() and table in run.stdout


def test_the_table_and_the_model_card_say_what_was_measured(photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    for name, metrics in {"PQModel": ["psnr", "lpips_alex"], "AutoencoderKL": ["psnr", "ssim"]}.items():
        tiny_model(name).save_pretrained(tmp_path / name)
        run_evaluation(Accelerator(cpu=True), str(tmp_path / name), photographs, tmp_path / "out", metrics=metrics)
    kl, pq = read_results(tmp_path / "out")
    lines = write_table(tmp_path / "out").splitlines()
    assert lines[0] == "### photographs, validation, 32 x 32, 7 pictures"
    assert lines[2] == ("| model | F | d | S | K | bits per pixel | PSNR (dB) | SSIM | LPIPS (alex) | H_n | P_n |")
    scores = kl["scores"]
    assert (
        lines[4] == f"| AutoencoderKL | 4 | 5 | - | - | 5 | {scores['psnr']:.2f} | {scores['ssim']:.4f} | - | - | - |"
    )
    scores = pq["scores"]
    utilisation = f"{scores['H_n']:.3f} | {scores['P_n']:.3f}"
    assert lines[5] == f"| PQModel | 4 | 8 | 4 | 16 | 1 | {scores['psnr']:.2f} | - | n/a | {utilisation} |"
    assert lines[7] == "- n/a: LPIPS (alex) needs https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"

    card = yaml.safe_load((tmp_path / "out/PQModel/photographs-validation-32/model-index.yml").read_text())
    (entry,) = card["model-index"]
    (measured,) = entry["results"]
    assert entry["name"] == "PQModel" and measured["dataset"]["split"] == "validation"
    assert measured["metrics"][0] == {"type": "psnr", "name": "PSNR (dB)", "value": scores["psnr"]}
    assert [metric["type"] for metric in measured["metrics"]] == ["psnr", "H_n", "P_n"]


def test_the_papers_protocol_sets_what_its_authors_do_and_is_not_contradicted(photographs, tmp_path, capsys):
    script = runpy.run_path(str(SCRIPT))
    tiny_model("AutoencoderKL").save_pretrained(tmp_path / "kl")
    flags = ["--pretrained_model_name_or_path", str(tmp_path / "kl"), "--data_dir", photographs.data_dir]
    flags += ["--resolution", "32", "--protocol", "paper", "--output_dir", str(tmp_path / "out")]
    args = script["parse_args"](flags)
    assert (args.split, args.resize_mode, args.image_interpolation_mode) == ("validation", "stretch", "bilinear")
    assert args.as_authors and args.metrics == list(METRICS)
    script["main"](script["parse_args"]([*flags, "--metrics", "psnr_pooled", "--dataloader_num_workers", "0"]))
    (result,) = read_results(tmp_path / "out")
    assert data_flags(result["settings"]) == {"protocol": "paper", "data_dir": photographs.data_dir, "resolution": 32}
    assert "32 x 32, stretched, by the protocol of the paper, 7 pictures" in capsys.readouterr().out
    assert (tmp_path / "out" / "kl" / "photographs-validation-32-paper" / "results.json").is_file()
    data = replace(photographs, resize_mode="stretch", image_interpolation_mode="bilinear")
    (batch,) = data.loader(batch_size=7)
    with PIL.Image.open(Path(photographs.data_dir, "validation", "4.png")) as picture:
        expected = np.asarray(picture.resize((32, 32), PIL.Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(to_uint8(batch[4]).permute(1, 2, 0).numpy(), expected)
    with pytest.raises(SystemExit):
        script["parse_args"]([*flags, "--resize_mode", "short_side"])
    assert "--protocol paper is with --resize_mode stretch, but short_side was given" in capsys.readouterr().err


def test_other_pictures_make_another_table(photographs, tmp_path):
    tiny_model("AutoencoderKL").save_pretrained(tmp_path / "kl")
    for data in (photographs, replace(photographs, resolution=16)):
        run_evaluation(Accelerator(cpu=True), str(tmp_path / "kl"), data, tmp_path / "out", metrics=["psnr"])
    titles = [line for line in results_table(read_results(tmp_path / "out")).splitlines() if line.startswith("#")]
    assert titles == [f"### photographs, validation, {side} x {side}, 7 pictures" for side in (16, 32)]
