#!/usr/bin/env python
"""A small-scale Table 5: compares models that `train_ldm.py` has trained in the same way on different latents.

    python experiments/latent_diffusion.py --runs PQ=runs/ldm-mini-pq VQ=runs/ldm-mini-vq KL=runs/ldm-mini-kl

Of each: (1) held-out pictures are encoded, mixed with noise, denoised in one step and decoded: PSNR and SSIM at fixed
signal-to-noise ratios of the latents; (2) samples of the training pictures' classes against these pictures: Fréchet
distances in feature spaces that need no downloads (not FID, whose Inception weights do). Writes latent_diffusion.json
and plots; samples stay in the runs' folders, so that a run that was stopped goes on.
"""

import copy
import datetime
import random
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from torchmetrics import MetricCollection

from diffusers_pq import LatentDiffusionPQPipeline
from diffusers_pq.autoencoders import decode_latents, encode_latents, scale_latents, weights_digest
from diffusers_pq.console import one_line_errors
from diffusers_pq.data.conditions import ClassLabels
from diffusers_pq.data.pictures import ConditionedCrops, Crops, PictureSource
from diffusers_pq.evaluation.data import EvaluationData
from diffusers_pq.evaluation.generation import Sampling, add_references, draw_samples, measure_samples
from diffusers_pq.evaluation.reconstruction import describe_latents
from diffusers_pq.files import read_json, replacing, write_json
from diffusers_pq.flags import COUNT, SCALE, FlagParser, named, number, output_folder, trained_unlike
from diffusers_pq.images import to_uint8
from diffusers_pq.measuring import describe_machine
from diffusers_pq.metrics import FID, PSNR, SSIM, PooledPSNR
from diffusers_pq.models.class_conditioning import predict
from diffusers_pq.tables import markdown_table
from diffusers_pq.training.latent_diffusion import LatentDiffusionOptions
from diffusers_pq.training.noise import add_noise, predicted_latents


# What is compared.
OWN_SETTINGS = ("vae_name_or_path", "vae_subfolder", "latents_dir", "noise_shift")
NOISE_DRAWS = 4  # for each held-out picture
THUMBNAIL_SIDE = 8


class Thumbnails(nn.Module):
    """Pictures shrunk to 8 x 8 pixels, as 192 features in [0, 1]."""

    num_features = 3 * THUMBNAIL_SIDE**2

    def forward(self, pictures):
        return F.adaptive_avg_pool2d(pictures / 255, THUMBNAIL_SIDE).flatten(1)


class EncoderFeatures(nn.Module):
    """What an autoencoder's encoder computes before its last convolution, averaged over the picture."""

    def __init__(self, vae):
        super().__init__()
        self.encoder = copy.deepcopy(vae.encoder)
        self.num_features = self.encoder.conv_out.in_channels
        self.encoder.conv_out = nn.Identity()

    @torch.no_grad()
    def forward(self, pictures):
        return self.encoder(pictures / 127.5 - 1).mean((2, 3))


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "--runs",
        nargs="+",
        required=True,
        type=named,
        metavar="NAME=FOLDER",
        help="output folders of train_ldm.py, with names for the plot",
    )
    parser.add_argument(
        "--snr",
        nargs="+",
        type=number(float, above=0),
        default=[30, 3, 1, 0.3, 0.1, 0.03],
        help="signal-to-noise ratios of the noisy latents",
    )
    parser.add_argument(
        "--num_samples", type=COUNT, help="samples of each run; default: as many as there are training pictures"
    )
    parser.add_argument("--num_inference_steps", type=COUNT, default=50, help="denoising steps of each sample")
    parser.add_argument("--guidance_scale", type=SCALE, default=1.0, help="guidance of the samples that are measured")
    parser.add_argument(
        "--grid_guidance_scale", type=SCALE, default=3.0, help="guidance of the samples that are shown"
    )
    parser.add_argument("--grid_classes", nargs="+", help="classes that are shown; default: the first eight")
    parser.add_argument("--batch_size", type=COUNT, default=32, help="pictures at once")
    parser.add_argument(
        "--output_dir", type=output_folder, default=Path("experiments/results"), help="folder of the results"
    )
    args = parser.parse_args(argv)
    args.runs = {name: Path(folder) for name, folder in args.runs}
    return args


def read_configs(runs):
    """How each run was trained; a `ValueError` if not as the others, or if there is no such run."""
    for label, folder in runs.items():
        if not folder.is_dir():
            raise ValueError(f"--runs {label}={folder}: there is no such folder")
    configs = {label: read_json(folder / "training_config.json") for label, folder in runs.items()}
    first, *others = configs
    for label in others:
        differing = trained_unlike(
            LatentDiffusionOptions, configs[label], configs[first], between_machines=False, own=OWN_SETTINGS
        )
        if differing:
            raise ValueError(f"{label} was not trained like {first}: {', '.join(sorted(differing))} differ.")
    return configs


def held_out_pictures(config, names):
    """All pictures of the validation split, `[N, 3, R, R]` in [-1, 1], and their labels."""
    rows = PictureSource(data_dir=config["train_data_dir"]).load("validation", config["label_column"])
    crops = Crops.middle("image", config["resolution"])
    transform = ConditionedCrops(crops, ClassLabels(config["label_column"], names))
    examples = [transform(row, random.Random(0)) for row in rows]
    return (torch.stack([example[key] for example in examples]) for key in ("pixel_values", "condition"))


@torch.no_grad()
def denoise_held_out(pipeline, pictures, labels, snr, batch_size):
    """PSNR and SSIM of held-out pictures after one denoising step from each noise level, and without noise."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # of the posterior of a KL autoencoder
    latents = torch.cat([scale_latents(pipeline.vae, encode_latents(pipeline.vae, p)) for p in pictures.split(32)])
    noise = torch.randn(NOISE_DRAWS, *latents.shape, generator=generator)
    levels = [{"timestep": None, "snr": None} | compare(pipeline, latents, pictures, batch_size)]
    for level in snr:
        timestep, found = timestep_at(pipeline.scheduler, level)
        timesteps = torch.full((len(labels),), timestep)
        predicted = [denoise(pipeline, latents, draw, labels, timesteps, batch_size) for draw in noise]
        scores = compare(pipeline, torch.cat(predicted), pictures.repeat(NOISE_DRAWS, 1, 1, 1), batch_size)
        levels.append({"timestep": timestep, "snr": found} | scores)
    return levels


def timestep_at(scheduler, snr):
    """The timestep with a signal-to-noise ratio, or in diffusion the one that comes closest; and its ratio."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return scheduler.config.num_train_timesteps / (1 + snr**0.5), snr
    alphas = scheduler.alphas_cumprod
    schedule = alphas / (1 - alphas)
    timestep = int((schedule / snr).log().abs().argmin())
    return timestep, float(schedule[timestep])


def denoise(pipeline, latents, noise, labels, timesteps, batch_size):
    """The latents that the denoiser predicts from noisy ones."""
    predicted = []
    for batch in zip(*(tensor.split(batch_size) for tensor in (latents, noise, labels, timesteps))):
        clean, drawn, label, timestep = batch
        noisy, _ = add_noise(pipeline.scheduler, clean, drawn, timestep)
        prediction = predict(pipeline.denoiser, noisy, timestep, label)
        predicted.append(predicted_latents(pipeline.scheduler, prediction, noisy, timestep))
    return torch.cat(predicted)


def compare(pipeline, latents, pictures, batch_size):
    metrics = MetricCollection({"psnr": PSNR(), "psnr_pooled": PooledPSNR(), "ssim": SSIM()}, compute_groups=False)
    for batch, originals in zip(latents.split(batch_size), pictures.split(batch_size)):
        metrics.update(images=to_uint8(decode_latents(pipeline.vae, batch)), references=to_uint8(originals))
    return {name: float(value) for name, value in metrics.compute().items()}


def measure_distances(accelerator, args, pipeline, folder, data, classes, references, spaces):
    """Fréchet distances of a run's samples, and of its autoencoder's reconstructions, to the training pictures."""
    sampling = Sampling(args.num_samples, args.guidance_scale, args.num_inference_steps, 0, args.batch_size)
    settings = f"samples-{weights_digest(pipeline.denoiser)[:8]}-{args.num_inference_steps}-{args.guidance_scale:g}"
    paths = draw_samples(accelerator, pipeline, classes, folder / settings, sampling)
    metrics = fresh_metrics(spaces)
    add_references(accelerator, metrics, data, references, args.batch_size)
    distances = {"samples": measure_samples(accelerator, metrics, paths, args.batch_size)}
    metrics = fresh_metrics(spaces)
    add_references(accelerator, metrics, data, references, args.batch_size)
    with torch.no_grad():
        for pictures in data.loader(args.batch_size):
            latents = scale_latents(pipeline.vae, encode_latents(pipeline.vae, pictures))
            metrics.update(images=to_uint8(decode_latents(pipeline.vae, latents)))
    return distances | {"reconstructions": {name: float(value) for name, value in metrics.compute().items()}}


def fresh_metrics(spaces):
    return MetricCollection({name: FID(space) for name, space in spaces.items()}, compute_groups=False)


def draw_grid(args, pipelines, classes, path):
    """A row for each run, a column for each class, each with the same noise's seed."""
    figure, axes = plt.subplots(
        len(pipelines), len(classes), figsize=(1.15 * len(classes), 1.2 * len(pipelines) + 0.3), squeeze=False
    )
    for row, (label, pipeline) in zip(axes, pipelines.items()):
        generators = [torch.Generator().manual_seed(number) for number in range(len(classes))]
        options = {"guidance_scale": args.grid_guidance_scale, "num_inference_steps": args.num_inference_steps}
        pictures = pipeline(classes, generator=generators, **options).images
        for axis, picture in zip(row, pictures):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label)
    for axis, name in zip(axes[0], classes):
        axis.set_title(name, fontsize=8)
    figure.tight_layout(pad=0.3)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=130)


def plot(runs, path):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (measure, title) in zip(axes, {"psnr": "PSNR (dB)", "ssim": "SSIM"}.items()):
        for label, run in runs.items():
            clean, *noisy = run["held_out"]
            snr = [level["snr"] for level in noisy]
            (line,) = axis.plot(snr, [level[measure] for level in noisy], marker="o", label=label)
            axis.axhline(clean[measure], color=line.get_color(), linestyle=":")
        axis.set(xscale="log", xlabel="signal-to-noise ratio of the latents", ylabel=title)
        axis.grid(alpha=0.3)
    axes[0].legend(title="dotted: without noise", fontsize=8, title_fontsize=8)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=120)


def markdown_tables(record):
    spaces = list(next(iter(record["runs"].values()))["frechet_distances"]["samples"])
    titles = ["bits per pixel", "no noise", *(f"SNR {level:g}" for level in record["settings"]["snr"])]
    noisy = [
        [
            label,
            # What was measured before they were recorded has none.
            f"{run['bits_per_pixel']:.4g}" if "bits_per_pixel" in run else "-",
            *(f"{level['psnr']:.2f} / {level['ssim']:.3f}" for level in run["held_out"]),
        ]
        for label, run in record["runs"].items()
    ]
    distances = [
        [f"{label}, {what}", *(f"{found[space]:.4g}" for space in spaces)]
        for label, run in record["runs"].items()
        for what, found in run["frechet_distances"].items()
    ]
    return (
        markdown_table(["PSNR (dB) / SSIM", *titles], noisy)
        + "\n\n"
        + markdown_table(["Fréchet distance", *spaces], distances)
    )


def main(args):
    accelerator = Accelerator(cpu=True)
    configs = read_configs(args.runs)
    pipelines = {label: LatentDiffusionPQPipeline.from_pretrained(folder) for label, folder in args.runs.items()}
    config = next(iter(configs.values()))
    names = list(next(iter(pipelines.values())).config.id2label.values())
    data = EvaluationData(data_dir=config["train_data_dir"], split="train", resolution=config["resolution"])
    rows = PictureSource(data_dir=config["train_data_dir"]).load("train", config["label_column"])
    classes = list(rows[config["label_column"]])
    random.Random(0).shuffle(classes)  # rows are sorted by class
    args.num_samples = args.num_samples or len(classes)
    args.grid_classes = args.grid_classes or names[:8]
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
        pipeline.get_label_ids(args.grid_classes)  # a wrong one shows before the measurements
    spaces = {f"{THUMBNAIL_SIDE} x {THUMBNAIL_SIDE} pixels": Thumbnails()}
    # Runs may share an autoencoder.
    encoders = {weights_digest(p.vae): (label, p.vae) for label, p in reversed(pipelines.items())}
    spaces |= {f"features of the {label} encoder": EncoderFeatures(vae) for label, vae in encoders.values()}
    pictures, labels = held_out_pictures(config, names)
    runs = {}
    with tempfile.TemporaryDirectory() as references:
        for label, pipeline in pipelines.items():
            measured = accelerator, args, pipeline, args.runs[label], data, classes, references, spaces
            runs[label] = {
                "config": configs[label],
                "denoiser_parameters": pipeline.denoiser.num_parameters(),
                "bits_per_pixel": describe_latents(pipeline.vae, config["resolution"])["bits_per_pixel"],
                "held_out": denoise_held_out(pipeline, pictures, labels, args.snr, args.batch_size),
                "frechet_distances": measure_distances(*measured),
            }
    settings = {key: value for key, value in vars(args).items() if key not in ("runs", "output_dir")}
    record = {"date": datetime.date.today().isoformat(), "machine": describe_machine("cpu"), "settings": settings}
    record |= {"held_out_pictures": len(pictures), "noise_draws": NOISE_DRAWS, "runs": runs}
    write_json(args.output_dir / "latent_diffusion.json", record)
    plot(runs, args.output_dir / "latent_diffusion.png")
    draw_grid(args, pipelines, args.grid_classes, args.output_dir / "latent_diffusion_samples.png")
    print(markdown_tables(record))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
