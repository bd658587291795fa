import json
import shutil
from argparse import Namespace
from pathlib import Path

import PIL.Image
import pytest
import torch
from accelerate.utils import LoggerType
from conftest import tiny_config
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from test_checkpoints import poison

from diffusers_pq import PQModel
from diffusers_pq.flags import parse
from diffusers_pq.training.checkpoints import list_checkpoints, read_record
from diffusers_pq.training.options import DataOptions, OptimisationOptions, RunOptions
from diffusers_pq.training.pqgan import PQGANOptions, train_pqgan
from diffusers_pq.training.run import (
    build_lr_scheduler,
    create_accelerator,
    dry_run,
    fitting_batches,
    load_train_split,
    load_validation_split,
)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup"])
def test_the_learning_rate_warms_up(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    args = Namespace(lr_scheduler=name, lr_warmup_steps=4, max_train_steps=8)
    scheduler = build_lr_scheduler(args, optimizer)
    rates = []
    for _ in range(6):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert rates == [0, 0.25, 0.5, 0.75, 1, 1]


def test_a_dry_run_says_what_fits_on_which_card():
    gib = 2**30
    line = fitting_batches(held=20 * gib, gradients=5 * gib, peak=9 * gib, batch_size=2)
    assert line == (
        "cards, by the batch of 2 that was measured: 24 GB: too small, 40 GB: batches of up to 5, "
        "80 GB: batches of up to 24"
    )


def test_a_dry_run_that_does_not_fit_says_what_is_needed_at_least():
    model = torch.nn.Linear(2**12, 2**12, bias=False)  # 64 MiB
    accelerator = Namespace(device=torch.device("cpu"))

    def take_step():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(MemoryError, match="weights and gradients alone take 0.12 GiB; CUDA out of memory"):
        dry_run(None, accelerator, {"model": model}, [torch.optim.AdamW(model.parameters())], take_step)


@pytest.fixture
def pictures(tmp_path):
    """120 grey pictures, each of another shade, without a `validation` split."""
    for number in range(120):
        PIL.Image.new("L", (8, 8), number).save(tmp_path / f"{number:03d}.png")
    return tmp_path


def shades(rows):
    return [int(Path(row["image"]["path"]).stem) for row in rows]


def test_a_share_of_the_pictures_is_held_back_where_there_is_no_validation_split(pictures):
    data = DataOptions(train_data_dir=str(pictures))
    held_back, rest = shades(load_validation_split(data)), shades(load_train_split(data))
    assert len(held_back) == 3 and sorted(held_back + rest) == list(range(120)) and rest == sorted(rest)
    assert shades(load_validation_split(data)) == held_back
    few = DataOptions(train_data_dir=str(pictures), max_train_samples=10)
    assert len(shades(load_train_split(few))) == 10 and shades(load_validation_split(few)) == held_back
    assert set(shades(load_train_split(few))) < set(rest) and shades(load_train_split(few)) == sorted(
        shades(load_train_split(few))
    )


def test_nothing_is_held_back_if_that_is_asked_for_or_there_is_a_split_or_a_stream(pictures):
    whole = DataOptions(train_data_dir=str(pictures), validation_share=0)
    assert load_validation_split(whole) is None and len(load_train_split(whole)) == 120
    stream = DataOptions(train_data_dir=str(pictures), streaming=True, max_train_samples=5)
    assert load_validation_split(stream) is None and shades(load_train_split(stream)) == list(range(5))
    (pictures / "validation").mkdir()
    PIL.Image.new("L", (8, 8)).save(pictures / "validation" / "7.png")
    data = DataOptions(train_data_dir=str(pictures))
    assert shades(load_validation_split(data)) == [7] and len(load_train_split(data)) == 120


@pytest.mark.parametrize(
    "report_to, message",
    [("wandb", "--report_to wandb: wandb is not installed"), ("tensorboard,paper", "--report_to paper is not known")],
)
def test_a_tracker_that_cannot_be_used_is_named(report_to, message, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_pq.training.run.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(ValueError, match=message):
        create_accelerator(OptimisationOptions(), RunOptions(output_dir=str(tmp_path), report_to=report_to))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Pictures, a model, and the output folder `run` of a training that was stopped after 4 of its steps."""
    folder = tmp_path_factory.mktemp("source")
    for split, count in (("train", 6), ("validation", 2)):
        (folder / "data" / split).mkdir(parents=True)
        for number in range(count):
            picture = PIL.Image.effect_noise((32, 32), 40 + number).convert("RGB")
            picture.save(folder / "data" / split / f"{number}.png")
    PQModel(**tiny_config()).save_config(folder / "pq")
    train(folder, folder / "run", "--use_ema")
    return folder


@pytest.fixture
def out(source, tmp_path):
    shutil.copytree(source / "run", tmp_path / "run")
    return tmp_path / "run"


def train(source, out, *flags, steps=4):
    given = ["--model_config_name_or_path", source / "pq", "--train_data_dir", source / "data", "--output_dir", out]
    given += ["--cache_dir", source / "cache", "--resolution", 32, "--train_batch_size", 2, "--learning_rate", 1e-3]
    given += ["--perceptual_weight", 0, "--discriminator_weight", 0, "--max_train_steps", steps, "--report_to", "none"]
    given += ["--checkpointing_steps", 2, "--validation_steps", 2]
    train_pqgan(PQGANOptions.of(parse(PQGANOptions, list(map(str, [*given, *flags])))))


def resume(source, out, *flags, steps=6, checkpoint="latest"):
    train(source, out, "--use_ema", "--resume_from_checkpoint", checkpoint, *flags, steps=steps)


def optimizer_of(checkpoint):
    (group,) = torch.load(checkpoint / "optimizer.bin", weights_only=True)["param_groups"]
    return group


def test_flags_of_optimiser_schedule_and_average_hold_when_a_run_is_resumed(source, out, caplog):
    flags = ("--learning_rate", 5e-4, "--adam_beta1", 0.7, "--adam_beta2", 0.8, "--ema_decay", 0.5)
    resume(source, out, *flags, "--lr_scheduler", "linear", steps=10)
    group = optimizer_of(out / "checkpoint-6")
    assert group["lr"] == pytest.approx(5e-4 * 4 / 10) and group["betas"] == (0.7, 0.8)
    assert optimizer_of(out / "checkpoint-4")["lr"] == 1e-3
    averages = torch.load(out / "checkpoint-6" / "custom_checkpoint_0.pkl", weights_only=True)
    assert averages["decay"] == 0.5
    assert "Goes on with other flags: " in caplog.text
    assert "--learning_rate 0.0005, before --learning_rate 0.001" in caplog.text
    card = ModelCard.load(out / "README.md").text
    assert "learning_rate: 0.0005" in card
    assert "- until step 4 `--max_train_steps 4`" in card and "`--learning_rate 0.001`" in card
    resume(source, out, *flags, "--lr_scheduler", "linear", "--learning_rate", 0, steps=12)
    assert "- until step 10 `--max_train_steps 10`, `--learning_rate 0.0005`" in ModelCard.load(out / "README.md").text


def test_the_first_step_after_resuming_has_the_new_rate(source, out):
    resume(source, out, "--learning_rate", 0)
    before, after = (load_file(out / f"checkpoint-{step}" / "model.safetensors") for step in (4, 6))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seed", 1], "--seed 1: the checkpoint was written with --seed 0, which a resumed run has to keep"),
        (["--no-use_ema"], "--no-use_ema: the checkpoint was written with --use_ema"),
        (["--discriminator_weight", 0.8], "--discriminator_weight 0.8: the checkpoint was written without a disc"),
        (["--codebook_ema_decay", 0.9], "--codebook_ema_decay 0.9: .* with no --codebook_ema_decay"),
        (["--weight_init", "pca"], "--weight_init pca: .* with --weight_init default"),
        (
            ["--train_batch_size", 4],
            "--train_batch_size 4: .* makes 4 pictures .* with 2, .* give --total_batch_size 2",
        ),
        (["--gradient_accumulation_steps", 2], "makes 4 pictures a step"),
        (["--max_train_steps", 3], "--max_train_steps 3: .*checkpoint-4 is of a later step. Give at least 4"),
        (["--model_config_name_or_path", "{}/other"], "checkpoint-4 is not of a run like this one"),
    ],
)
def test_a_run_that_cannot_go_on_so_is_refused_in_one_line(source, out, flags, message):
    PQModel(**tiny_config(block_out_channels=(8, 8, 32))).save_config(source / "other")
    before = sorted(out.rglob("*")), (out / "training_config.json").read_text()
    with pytest.raises(ValueError, match=message):
        resume(source, out, *(str(flag).format(source) for flag in flags))
    assert (sorted(out.rglob("*")), (out / "training_config.json").read_text()) == before


def test_the_pictures_of_a_step_may_be_dealt_out_otherwise(source, out):
    resume(source, out, "--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    assert (out / "checkpoint-6").is_dir()


def test_a_finished_run_that_is_started_again_keeps_its_results(source, out):
    resume(source, out, steps=4)
    before, after = (ModelCard.load(folder / "README.md") for folder in (source / "run", out))
    assert after.data.eval_results == before.data.eval_results != []
    results = before.text.partition("### Validation during training")[2]
    assert results and after.text.partition("### Validation during training")[2] == results


def test_a_run_in_a_used_folder_says_what_it_wants(source, out):
    weights = (out / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is in use: go on with `--resume_from_checkpoint latest`"):
        train(source, out)
    with pytest.raises(SystemExit):
        resume(source, out, "--overwrite_output_dir")
    assert (out / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    train(source, out, "--dry_run", steps=1)
    train(source, out, "--overwrite_output_dir", "--learning_rate", 0, steps=2)
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-2"]
    assert json.loads((out / "best" / "validation.json").read_text())["step"] == 2
    assert read_record(out / "checkpoint-2")["changes"] == []
    assert (out / "old-run-1" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    assert {path.name for path in (out / "old-run-1").iterdir()} >= {"checkpoint-2", "checkpoint-4", "best"}


def test_after_going_back_the_newest_checkpoint_and_the_best_model_are_of_this_run(source, out, caplog):
    (out / "best" / "validation.json").write_text(json.dumps({"step": 4, "psnr": 99.0}))
    resume(source, out, checkpoint="checkpoint-2", steps=3)
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-2"] and not (out / "best").exists()
    assert {path.name for path in (out / "old-run-1").iterdir()} == {"checkpoint-4", "best"}


@pytest.mark.parametrize("flags, kept", [((), True), (("--adam_beta1", "0.7"), False)])
def test_a_best_model_of_steps_that_are_made_again_stays(source, out, flags, kept):
    """A run that was killed after a validation, before the next checkpoint."""
    resume(source, out)
    shutil.rmtree(out / "checkpoint-6")
    (out / "best" / "validation.json").write_text(json.dumps({"step": 6, "psnr": 99.0}))
    resume(source, out, *flags, "--validation_steps", 5)
    assert (json.loads((out / "best" / "validation.json").read_text())["psnr"] == 99) == kept


def test_a_hostile_checkpoint_ends_the_run_in_one_line(source, out, tmp_path):
    poison(out / "checkpoint-4", "custom_checkpoint_0.pkl", tmp_path / "mark")
    with pytest.raises(ValueError, match="custom_checkpoint_0.pkl is not read: it may hold code"):
        resume(source, out)
    assert not (tmp_path / "mark").exists()


def test_training_lets_cudnn_find_the_fastest_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    create_accelerator(OptimisationOptions(), RunOptions(report_to="none"))
    assert torch.backends.cudnn.benchmark
