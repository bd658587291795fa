#!/usr/bin/env python
"""Generation from product codes beside latent diffusion: small models of as many parameters (within 10 %) that are
trained alike, on the same pictures, for as many steps, on the latents or codes of the mini autoencoders.

    python experiments/masked_generation.py --data_dir data/emoji --label_column group

Of each system and seed: Fréchet distances in the features of an EfficientNet-Lite0 (they compare with no FID) of its
samples to pictures of the training and to held-out ones, seconds of the processor a picture, bits per code of held-out
pictures, and for the first seed a sheet of samples with guidance, a column for each class. `--steps` are the sampling
steps T of masked transformers, the first one that of the comparison; `--orders` and `--systems masked-pq-random` are
ablations on PQ codes.

Trainings and samples stay in `--runs_dir`, and what is measured is written at once: a run that was stopped goes on.
Writes masked_generation.json and masked_generation_samples.jpg.
"""

import copy
import datetime
import itertools
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
from accelerate import Accelerator
from spread import mean_and_spread

from diffusers_pq import LatentDiffusionPQPipeline, MaskedPQPipeline
from diffusers_pq.autoencoders import decode_latents, encode_latents, scale_latents
from diffusers_pq.console import one_line_errors
from diffusers_pq.data.conditions import ClassLabels, class_names
from diffusers_pq.data.pictures import ConditionedCrops, Crops, PictureSource
from diffusers_pq.evaluation.code_length import bits_per_code
from diffusers_pq.evaluation.generation import Sampling, draw_samples
from diffusers_pq.files import read_json, replacing, write_json
from diffusers_pq.flags import COUNT, SCALE, SEED, FlagParser, output_folder
from diffusers_pq.images import load_image, to_tensor, to_uint8
from diffusers_pq.measuring import describe_machine
from diffusers_pq.metrics import load_fd_efficientnet_lite0
from diffusers_pq.tables import markdown_table
from diffusers_pq.training.latent_diffusion import LatentDiffusionOptions, train_latent_diffusion
from diffusers_pq.training.masked import MaskedOptions, train_masked


ROOT = Path(__file__).parent.parent
TRANSFORMER = {"_class_name": "PQMaskedTransformer", "code_embed_dim": 16, "num_layers": 3, "num_attention_heads": 3}
UNET = {"block_out_channels": [64, 80]}
DIFFUSION = {"learning_rate": 5e-4, "prediction_type": "v_prediction", "channel_weighting": 1.0}
DIFFUSION_STEPS = 50
MOST_UNLIKE = 0.1  # in parameters
GROUPS = 4  # of subspaces, coarse to fine
SHEET = 8  # classes that are shown


@dataclass(frozen=True)
class System:
    """What is compared: its title, its autoencoder in model_cards/, and what of its model or training is its own."""

    title: str
    vae: str
    is_masked: bool
    config: dict
    flags: dict


SYSTEMS = {
    "masked-pq": System("masked codes, PQ (S = 32)", "pqgan-mini-f8-pq", True, {}, {}),
    # One table instead of 32: wider embeddings make up for its parameters.
    "masked-vq": System("masked codes, VQ (S = 1, MaskGIT)", "pqgan-mini-f8-vq", True, {"code_embed_dim": 128}, {}),
    "diffusion-pq": System("latent diffusion, PQ latents", "pqgan-mini-f8-pq", False, {}, {}),
    "diffusion-kl": System("latent diffusion, KL latents", "pqgan-mini-f8-kl", False, {}, {}),
    "masked-pq-random": System(
        "masked codes, PQ, embeddings start at random", "pqgan-mini-f8-pq", True, {}, {"code_embedding_init": "random"}
    ),
}
COMPARED = tuple(SYSTEMS)[:4]


class CoarseToFine:
    """
    A masked pipeline that generates the subspaces in groups, those whose entries lie the furthest apart first.

    Args:
        pipeline ([`MaskedPQPipeline`])
    """

    def __init__(self, pipeline: MaskedPQPipeline):
        self.pipeline = pipeline
        spread = pipeline.vae.quantizer.entries.var(1).sum(-1)
        self.groups = spread.argsort(descending=True).chunk(GROUPS)

    def set_progress_bar_config(self, **options):
        self.pipeline.set_progress_bar_config(**options)

    def __call__(self, class_labels: list, num_inference_steps: int, **options):
        vae, side = self.pipeline.vae.config, self.pipeline.transformer.config.sample_size
        codes = torch.full((len(class_labels), vae.num_subspaces, side, side), -1)
        for number, group in enumerate(self.groups):
            is_last = number == len(self.groups) - 1
            painted = self.pipeline(
                class_labels=class_labels,
                codes=codes,
                num_inference_steps=max(1, num_inference_steps // GROUPS),
                **options | ({} if is_last else {"output_type": "latent"}),
            )
            if not is_last:
                codes[:, group] = painted.images[:, group].cpu()
        return painted


def parse_args(argv=None):
    parser = FlagParser(description=__doc__)
    parser.add_argument("--data_dir", required=True, help="folder of pictures with classes, in splits")
    parser.add_argument("--label_column", default="group", help="column of the classes")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(COMPARED), help="what is compared")
    parser.add_argument("--seeds", nargs="+", type=SEED, default=[0, 1, 2], help="seeds of each system")
    parser.add_argument("--resolution", type=COUNT, default=64, help="side of the pictures, in pixels")
    parser.add_argument("--max_train_steps", type=COUNT, default=3000, help="optimisation steps of each training")
    parser.add_argument("--train_batch_size", type=COUNT, default=32, help="pictures of each optimisation step")
    parser.add_argument("--steps", nargs="+", type=COUNT, default=[32, 8, 16, 64], help="T of masked transformers")
    parser.add_argument(
        "--orders",
        nargs="+",
        choices=("confidence", "random", "coarse_to_fine"),
        default=["confidence"],
        help="in which PQ codes are fixed; the first in the comparison, the others once each, by the first seed",
    )
    parser.add_argument("--num_samples", type=COUNT, default=295, help="samples of each measurement")
    parser.add_argument("--num_references", type=COUNT, default=295, help="at most so many pictures to compare with")
    parser.add_argument(
        "--sheet_guidance_scale", type=SCALE, default=3.0, help="guidance of the samples that are shown"
    )
    parser.add_argument("--batch_size", type=COUNT, default=32, help="pictures measured at once")
    parser.add_argument("--cache_dir", help="where datasets are kept; default: the Hub's cache")
    parser.add_argument(
        "--runs_dir", type=Path, default=ROOT / "runs" / "masked_generation", help="folder of the trainings"
    )
    parser.add_argument(
        "--output_dir", type=output_folder, default=ROOT / "experiments" / "results", help="folder of the results"
    )
    return parser.parse_args(argv)


def train(system: System, seed: int, folder: Path, args):
    """Train a system, unless that was done."""
    if (folder / "model_index.json").is_file():
        return
    recipe = ROOT / "training_scripts" / "recipes" / "ldm-mini" / "unet.json"
    config = TRANSFORMER | system.config if system.is_masked else read_json(recipe) | UNET
    write_json(folder / "config.json", config)
    flags = {"vae_name_or_path": str(ROOT / "model_cards" / system.vae), "output_dir": str(folder), "seed": seed}
    flags |= {"model_config_name_or_path": str(folder / "config.json"), "train_data_dir": args.data_dir}
    flags |= {"label_column": args.label_column, "cache_dir": args.cache_dir, "resolution": args.resolution}
    flags |= {"min_image_side": 1, "center_crop": True, "train_batch_size": args.train_batch_size}
    flags |= {"max_train_steps": args.max_train_steps, "lr_scheduler": "cosine", "lr_warmup_steps": 50}
    flags |= {"use_ema": True, "ema_decay": 0.995, "report_to": "none", "validation_steps": 10**9}
    flags |= {"checkpointing_steps": 50, "checkpoints_total_limit": 1, "resume_from_checkpoint": "latest"}
    if system.is_masked:
        train_masked(MaskedOptions.of(flags | {"learning_rate": 6e-4, "label_smoothing": 0.0} | system.flags))
    else:
        train_latent_diffusion(LatentDiffusionOptions.of(flags | {"num_statistics_images": 320} | DIFFUSION))


def load(system: System, folder: Path):
    """The pipeline of a trained system, and its model."""
    pipeline = (MaskedPQPipeline if system.is_masked else LatentDiffusionPQPipeline).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.transformer if system.is_masked else pipeline.denoiser


class Measurements:
    """The pictures that samples are compared with, and distances to them."""

    def __init__(self, args):
        self.args = args
        self.labels, self.pictures, self._distances = {}, {}, {}
        rows = PictureSource(data_dir=args.data_dir, cache_dir=args.cache_dir)
        names = class_names(rows.load("train", args.label_column), args.label_column)
        crops = Crops.middle("image", args.resolution)
        example = ConditionedCrops(crops, ClassLabels(args.label_column, names))
        fresh = load_fd_efficientnet_lite0()
        for what, split in {"train": "train", "held_out": "validation"}.items():
            found = rows.load(split, args.label_column)
            if found is None:
                raise ValueError(f"--data_dir {args.data_dir} has no {split!r} split.")
            # Rows are sorted: a random choice, always the same.
            chosen = random.Random(0).sample(range(len(found)), min(args.num_references, len(found)))
            examples = [example(found[number], random.Random(0)) for number in chosen]
            self.pictures[what] = torch.stack([one["pixel_values"] for one in examples])
            self.labels[what] = torch.stack([one["condition"] for one in examples])
            self._distances[what] = copy.deepcopy(fresh)
            for batch in self.pictures[what].split(args.batch_size):
                self._distances[what].update(references=to_uint8(batch))

    def distances(self, pictures: torch.Tensor) -> dict[str, float]:
        """Fréchet distances of uint8 pictures to those of the training and to held-out ones."""
        train, held_out = (copy.deepcopy(self._distances[what]) for what in ("train", "held_out"))
        for batch in pictures.split(self.args.batch_size):
            train.update(images=batch)
        # The same features of the same pictures.
        for name in ("fake_features_sum", "fake_features_cov_sum", "fake_features_num_samples"):
            setattr(held_out, name, getattr(train, name).clone())
        return {"train": float(train.compute()), "held_out": float(held_out.compute())}

    def reconstructions(self, vae: nn.Module) -> dict[str, float]:
        """Distances of held-out pictures after the autoencoder: what a perfect model of its latents would have."""
        with torch.no_grad():
            decoded = [
                to_uint8(decode_latents(vae, scale_latents(vae, encode_latents(vae, batch))))
                for batch in self.pictures["held_out"].split(self.args.batch_size)
            ]
        return self.distances(torch.cat(decoded))

    def samples(self, pipeline, folder: Path, steps: int, **options) -> dict:
        """Distances and seconds a picture of samples, which stay in a folder."""
        if folder.is_dir():  # of a run that was stopped: all samples are to be timed
            shutil.rmtree(folder)
        labels = self.labels["train"].tolist()
        sampling = Sampling(self.args.num_samples, 1.0, steps, seed=0, batch_size=self.args.batch_size)
        start = time.process_time()
        paths = draw_samples(Accelerator(cpu=True), pipeline, labels, folder, sampling, **options)
        seconds = (time.process_time() - start) / len(paths)
        pictures = to_uint8(torch.stack([to_tensor(load_image(path)) for path in paths]))
        return {"steps": steps, "seconds_per_picture": seconds, "distances": self.distances(pictures)}


def measure(name: str, seed: int, settings: list[tuple[str, int]], args, measurements: Measurements):
    """Measure what has not been, with orders and steps, and write it at once."""
    folder = args.runs_dir / f"seed{seed}" / name
    system, path = SYSTEMS[name], folder / "results.json"
    pipeline, model = load(system, folder)
    record = read_json(path) if path.is_file() else {"system": name, "seed": seed, "samples": {}}
    record |= {"parameters": model.num_parameters(), "settings": settings_of(args)}
    if seed == args.seeds[0] and "reconstructions" not in record:
        record["reconstructions"] = measurements.reconstructions(pipeline.vae)
        write_json(path, record)
    if system.is_masked and "bits_per_code" not in record:
        record["bits_per_code"] = held_out_bits(pipeline, measurements)
        write_json(path, record)
    if seed == args.seeds[0]:
        order, steps = settings[0]
        options = {"order": order} if system.is_masked else {}
        labels = list(pipeline.config.id2label.values())[:SHEET]
        sampling = Sampling(len(labels), args.sheet_guidance_scale, steps, seed=0, batch_size=len(labels))
        draw_samples(Accelerator(cpu=True), pipeline, labels, folder / "sheet", sampling, **options)
        record["sheet"] = labels
        write_json(path, record)
    for order, steps in settings:
        key = f"{order}-{steps}"
        if key in record["samples"]:
            continue
        painter, options = pipeline, {"order": order} if system.is_masked else {}
        if order == "coarse_to_fine":
            painter, options = CoarseToFine(pipeline), {"order": "confidence"}
        measured = measurements.samples(painter, folder / f"samples-{key}", steps, **options)
        record["samples"][key] = {"order": order} | measured
        record |= {"date": datetime.date.today().isoformat(), "machine": describe_machine("cpu")}
        write_json(path, record)


def settings_of(args) -> dict:
    """What all systems that are compared have in common."""
    names = ("label_column", "resolution", "max_train_steps", "train_batch_size", "num_samples", "num_references")
    return {"data": Path(args.data_dir).name} | {name: getattr(args, name) for name in names}


def compared_setting(name: str, args) -> tuple[str, int]:
    """Order and steps of a system in the comparison."""
    return (args.orders[0], args.steps[0]) if SYSTEMS[name].is_masked else ("diffusion", DIFFUSION_STEPS)


def further_settings(args) -> list[tuple[str, int]]:
    """Other steps, and other orders, of the masked transformer on PQ codes."""
    orders = [(order, args.steps[0]) for order in args.orders[1:]]
    return [(args.orders[0], steps) for steps in args.steps[1:]] + orders


def held_out_bits(pipeline: MaskedPQPipeline, measurements: Measurements) -> dict[str, float]:
    """Of up to a batch of held-out pictures."""
    count = measurements.args.batch_size
    pictures, labels = (part["held_out"][:count] for part in (measurements.pictures, measurements.labels))
    with torch.no_grad():
        codes = pipeline.vae.encode_codes(pictures)
    generator = torch.Generator().manual_seed(0)
    return bits_per_code(pipeline.vae, pipeline.transformer, codes, {"class_labels": labels}, 32, generator)


def check_alike(records: list[dict]):
    """Raise a `ValueError` if systems cannot be compared."""
    first = records[0]
    for record in records[1:]:
        if record["settings"] != first["settings"]:
            raise ValueError(
                f"{record['system']}, seed {record['seed']}, was made with {record['settings']}, "
                f"{first['system']} with {first['settings']}: choose another --runs_dir."
            )
        if abs(record["parameters"] / first["parameters"] - 1) > MOST_UNLIKE:
            raise ValueError(
                f"{record['system']} has {record['parameters']} parameters, {first['system']} {first['parameters']}: "
                "more than 10 % apart."
            )


def collect(args) -> dict:
    """The results of all trainings so far."""
    paths = (args.runs_dir / f"seed{seed}" / name / "results.json" for name in SYSTEMS for seed in args.seeds)
    records = [read_json(path) for path in paths if path.is_file()]
    check_alike(records)
    return {"titles": {name: SYSTEMS[name].title for name in SYSTEMS}, "runs": records}


def draw_sheet(args, record: dict, path: Path):
    """A row of samples of the first seed for each system, a column for each class."""
    shown = [run for run in record["runs"] if "sheet" in run]
    columns = shown[0]["sheet"]
    size = (1.1 * len(columns), 1.25 * len(shown))
    figure, axes = plt.subplots(len(shown), len(columns), figsize=size, squeeze=False)
    for run, row in zip(shown, axes):
        folder = args.runs_dir / f"seed{run['seed']}" / run["system"] / "sheet"
        for axis, picture in zip(row, sorted(folder.glob("*.png"))):
            axis.imshow(load_image(picture))
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(run["system"], fontsize=7)
    for axis, name in zip(axes[0], columns):
        axis.set_title(name, fontsize=6)
    figure.tight_layout(pad=0.3)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=100, format="jpeg", pil_kwargs={"quality": 80})
    plt.close(figure)


def publish(args):
    """Write the results so far."""
    record = collect(args)
    write_json(args.output_dir / "masked_generation.json", record)
    draw_sheet(args, record, args.output_dir / "masked_generation_samples.jpg")
    print(results_table(record), flush=True)


def results_table(record) -> str:
    """Markdown: the comparison with mean and spread over seeds, and what else was measured."""
    first = record["runs"][0]
    settings = first["settings"]
    seeds = sorted({run["seed"] for run in record["runs"]})
    lines = []
    for name, title in record["titles"].items():
        runs = [run for run in record["runs"] if run["system"] == name]
        if runs:
            lines.append([title, *_cells(runs)])
    head = ["system", "parameters", "seeds", "steps T", "FD, EfficientNet-Lite0, to training pictures"]
    head += [
        "to held-out pictures",
        "of the autoencoder alone",
        "CPU seconds a picture",
        "bits per code",
        "adaptive coder",
    ]
    conditions = (
        f"{max(run['date'] for run in record['runs'])}, {first['machine']}: {settings['max_train_steps']} steps of "
        f"{settings['train_batch_size']} pictures of {settings['resolution']} px of {settings['data']} by "
        f"`{settings['label_column']}`; seeds {', '.join(map(str, seeds))}; {settings['num_samples']} samples without "
        f"guidance against at most {settings['num_references']} pictures; mean ± standard deviation over seeds."
    )
    tables = [conditions, "", markdown_table(head, lines)]
    sampled = [run for run in record["runs"] if run["system"] == "masked-pq" and len(run["samples"]) > 1]
    if sampled:
        more = sorted(sampled[0]["samples"].values(), key=lambda one: (one["order"], one["steps"]))
        head = ["order", "steps T", "FD to training pictures", "to held-out pictures", "CPU seconds a picture"]
        tables += ["", f"Masked codes, PQ, seed {sampled[0]['seed']}:", "", markdown_table(head, map(_sampled, more))]
    return "\n".join(tables)


def _cells(runs):
    main = [next(iter(run["samples"].values())) for run in runs]
    bits = [run["bits_per_code"] for run in runs if "bits_per_code" in run]
    floor = [run["reconstructions"]["held_out"] for run in runs if "reconstructions" in run]
    return [
        f"{runs[0]['parameters'] / 1e6:.2f}M",
        len(runs),
        main[0]["steps"],
        *(mean_and_spread([one["distances"][what] for one in main], ".4g") for what in ("train", "held_out")),
        mean_and_spread(floor, ".4g") if floor else "-",
        mean_and_spread([one["seconds_per_picture"] for one in main], ".3g"),
        mean_and_spread([one["masked"] for one in bits], ".2f") if bits else "-",
        mean_and_spread([one["adaptive"] for one in bits], ".2f") if bits else "-",
    ]


def _sampled(one):
    distances = (f"{one['distances'][what]:.4g}" for what in ("train", "held_out"))
    return [one["order"].replace("_", " "), one["steps"], *distances, f"{one['seconds_per_picture']:.3g}"]


def main(args):
    measurements = Measurements(args)
    for seed, name in itertools.product(args.seeds, args.systems):
        train(SYSTEMS[name], seed, args.runs_dir / f"seed{seed}" / name, args)
        measure(name, seed, [compared_setting(name, args)], args, measurements)
        publish(args)
    if "masked-pq" in args.systems:
        measure("masked-pq", args.seeds[0], further_settings(args), args, measurements)
        publish(args)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_args())
