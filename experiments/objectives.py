#!/usr/bin/env python
"""Compare what a denoiser of many latent channels predicts (epsilon, v, the latents or a flow's velocity), how wide it
is, and how far its noise schedule is shifted. Each combination is a small class-conditional UNet, trained alike with
several seeds.

    python experiments/objectives.py --data_dir data/emoji --label_column group

Measures the PSNR of held-out pictures after one denoising step from fixed signal-to-noise ratios of the latents, and
the Fréchet distance from samples to training pictures in the features of an EfficientNet-Lite0, which is not FID.

Trainings are kept in `--runs_dir` and each measurement is written at once, so an interrupted run resumes. Writes
objectives.json.
"""

import itertools
import random
from pathlib import Path

from accelerate import Accelerator
from latent_diffusion import denoise_held_out, held_out_pictures
from run_record import add_run, is_measured, open_record
from spread import mean_and_spread
from torchmetrics import MetricCollection

from diffusers_pq import LatentDiffusionPQPipeline
from diffusers_pq.console import one_line_errors
from diffusers_pq.data.pictures import PictureSource
from diffusers_pq.evaluation.data import EvaluationData
from diffusers_pq.evaluation.generation import Sampling, add_references, draw_samples, measure_samples
from diffusers_pq.files import read_json, write_json
from diffusers_pq.flags import COUNT, SEED, FlagParser, number, output_folder
from diffusers_pq.metrics import load_fd_efficientnet_lite0
from diffusers_pq.tables import markdown_table
from diffusers_pq.training.latent_diffusion import LatentDiffusionOptions, train_latent_diffusion
from diffusers_pq.training.options import noise_shift


ROOT = Path(__file__).parent.parent
UNET = ROOT / "training_scripts" / "recipes" / "ldm-mini" / "unet.json"
# What a denoiser predicts, by name.
OBJECTIVES = {
    "epsilon": {"objective": "diffusion", "prediction_type": "epsilon"},
    "v": {"objective": "diffusion", "prediction_type": "v_prediction"},
    "sample": {"objective": "diffusion", "prediction_type": "sample"},
    "flow": {"objective": "flow_matching"},
    "flow, sample": {"objective": "flow_matching", "prediction_type": "sample"},
}
COLUMNS = ("objective", "width", "shift")
BATCH_SIZE = 32


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of pictures with labels and a validation")
    parser.add_argument("--label_column", default="group", help="column of the classes")
    parser.add_argument(
        "--vae", default=str(ROOT / "model_cards" / "pqgan-mini-f8-pq"), help="autoencoder of the latents"
    )
    parser.add_argument("--resolution", type=COUNT, default=64, help="side of the pictures, in pixels")
    parser.add_argument(
        "--objectives", nargs="+", choices=OBJECTIVES, default=["v", "sample", "flow"], help="what is predicted"
    )
    parser.add_argument(
        "--widths",
        nargs="+",
        type=COUNT,
        default=[32, 64],
        help="channels of the UNet's first level; twice as many below",
    )
    parser.add_argument(
        "--shifts",
        nargs="+",
        type=noise_shift,
        default=[1.0, 2.0],
        help="of the schedule; auto goes by the latents' size",
    )
    parser.add_argument("--seeds", nargs="+", type=SEED, default=[0, 1, 2], help="seeds of the trainings")
    parser.add_argument("--steps", type=COUNT, default=1500, help="steps of each training")
    parser.add_argument(
        "--snr", nargs="+", type=number(float, above=0), default=[10, 1, 0.1], help="ratios that are denoised from"
    )
    parser.add_argument("--num_samples", type=number(int, minimum=2), default=512, help="samples of each model")
    parser.add_argument("--num_inference_steps", type=COUNT, default=50, help="steps of each sample")
    parser.add_argument(
        "--runs_dir", type=output_folder, default=ROOT / "runs" / "objectives", help="of the trainings"
    )
    parser.add_argument(
        "--output_dir", type=output_folder, default=ROOT / "experiments" / "results", help="folder of the results"
    )
    return parser.parse_args(argv)


def train(args, folder, combination):
    """Train a model, or what is left to do of it."""
    config = folder.parent / f"unet-{combination['width']}.json"
    widths = [combination["width"], 2 * combination["width"]]
    write_json(config, read_json(UNET, dict) | {"block_out_channels": widths})
    flags = {
        "vae_name_or_path": args.vae,
        "model_config_name_or_path": str(config),
        "train_data_dir": str(args.data_dir),
        "label_column": args.label_column,
        "resolution": args.resolution,
        "min_image_side": 1,
        "center_crop": True,
        "train_batch_size": BATCH_SIZE,
        "max_train_steps": args.steps,
        "learning_rate": 5e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": min(100, args.steps // 10),
        "use_ema": True,
        "ema_decay": 0.995,
        "channel_weighting": 1.0,
        "num_statistics_images": 320,
        "checkpointing_steps": 250,
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "validation_steps": args.steps,
        "num_validation_images": 64,
        "report_to": "none",
        "noise_shift": combination["shift"],
        "seed": combination["seed"],
        "output_dir": str(folder),
    }
    train_latent_diffusion(LatentDiffusionOptions.of(flags | OBJECTIVES[combination["objective"]]))


def measure(args, folder):
    """PSNR after one denoising step from each ratio, `frechet_distance` of the samples, and the UNet's parameters."""
    pipeline = LatentDiffusionPQPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    config = read_json(folder / "training_config.json", dict)
    pictures, labels = held_out_pictures(config, list(pipeline.config.id2label.values()))
    clean, *noisy = denoise_held_out(pipeline, pictures, labels, args.snr, BATCH_SIZE)
    rows = PictureSource(data_dir=config["train_data_dir"]).load("train", args.label_column)
    classes = list(rows[args.label_column])
    random.Random(0).shuffle(classes)  # rows are sorted
    accelerator = Accelerator(cpu=True)
    sampling = Sampling(args.num_samples, 1.0, args.num_inference_steps, 0, BATCH_SIZE)
    paths = draw_samples(accelerator, pipeline, classes, folder / "samples", sampling)
    metrics = MetricCollection({"frechet_distance": load_fd_efficientnet_lite0()})
    data = EvaluationData(data_dir=config["train_data_dir"], split="train", resolution=args.resolution)
    add_references(accelerator, metrics, data, args.runs_dir / "references", BATCH_SIZE)
    return {
        "psnr_without_noise": clean["psnr_pooled"],
        "psnr": [level["psnr_pooled"] for level in noisy],
        "unet_parameters": pipeline.denoiser.num_parameters(),
        **measure_samples(accelerator, metrics, paths, BATCH_SIZE),
    }


def objectives_table(record):
    """Markdown: a row for each objective, width and shift, over the seeds."""
    head = [*COLUMNS, *(f"PSNR from SNR {ratio:g} (dB)" for ratio in record["settings"]["snr"])]
    head += ["FD, EfficientNet-Lite0", "seeds"]
    lines = []
    for key, group in itertools.groupby(record["runs"], lambda run: [run[column] for column in COLUMNS]):
        runs = list(group)
        scores = [mean_and_spread(values, ".2f") for values in zip(*(run["psnr"] for run in runs))]
        scores.append(mean_and_spread([run["frechet_distance"] for run in runs], ".1f"))
        lines.append([*key, *scores, len(runs)])
    return markdown_table(head, lines)


def main(args):
    path = args.output_dir / "objectives.json"
    settings = {"snr": args.snr, "steps": args.steps, "num_samples": args.num_samples}
    settings |= {"num_inference_steps": args.num_inference_steps, "resolution": args.resolution}
    settings |= {"data_dir": args.data_dir.name, "vae": Path(args.vae).name}
    record = open_record(path, settings)
    for values in itertools.product(args.objectives, args.widths, args.shifts, args.seeds):
        combination = dict(zip((*COLUMNS, "seed"), values))
        if is_measured(record, combination):
            continue
        folder = args.runs_dir / "-".join(str(value).replace(", ", "-") for value in values)
        train(args, folder, combination)
        run = combination | measure(args, folder)
        add_run(path, record, run, order=lambda run: [str(run[column]) for column in (*COLUMNS, "seed")])
    print(objectives_table(record))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
